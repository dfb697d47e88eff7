"""When a run will be done: an estimate by what it has measured so far.

    time left = training + pauses + samples + scoring
    training  = steps left of this task * pace + sum of steps * pace of the tasks to come
    pauses    = sum over the boundaries k to come of k * min_i(pause_i / i)
    samples   = images behind the last task * seconds an image
    scoring   = images that no score has drawn yet * seconds an image

`pace` is the median time between the last steps. A task to come has the steps that run.json plans
for it, else as many as this one; where `recall` has not rehearsed yet, each of its steps counts
1 + 1/every times. `pause_i` lies between the last step of task i and the first of the next: saving,
samples, encoding, drawing what is rehearsed. It grows with the concepts that are known (those of
the parent included), and the least share bears no stop in it. run.json says how many images will be
drawn (`to_draw`), and how long the newest samples took; none is timed before the first. Loading the
base anew for the scores, their encoders and --export are not counted. The console and `lcp watch`
tell the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

Facts = Mapping[str, Any]
PACED = 50  # steps that the pace is the median of
REHEARSER = "recall"


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until a run is done; `scoring` is None where scores are asked for and no image has
    told yet how long one takes.
    """

    training: float  # steps, and what lies between tasks
    scoring: float | None = 0.0  # drawing what the run is scored by

    @property
    def seconds(self) -> float:
        """All that is known."""
        return self.training + (self.scoring or 0.0)


@dataclass(frozen=True)
class Standing:
    """Where a run stands, as far as its time goes."""

    tasks: tuple[str, ...]  # names of the run's own, in order
    position: int  # of the task in training among them, from 1
    step: int
    total: int  # steps of that task
    pace: float  # seconds a step
    start: int = 0  # concepts that were known before
    pauses: tuple[float, ...] = ()  # seconds between two tasks / concepts that were known then
    slower: float = 1.0  # how much longer a step of the tasks to come takes
    scored: int = 0  # images of the scores that are drawn


def estimate(facts: Facts, at: Standing) -> TimeLeft:
    """What is still to be done, in seconds. `facts`: run.json."""
    training = (at.total - at.step) * at.pace
    coming = (_planned(facts, name, at.total) for name in at.tasks[at.position :])
    training += sum(coming) * at.pace * at.slower
    share = min((share for share in at.pauses if share > 0), default=0.0)
    training += share * sum(at.start + k for k in range(at.position, len(at.tasks)))
    training += (seconds_an_image(facts) or 0.0) * _images(facts, "samples")
    return TimeLeft(training, estimate_scoring(facts, at.scored))


def estimate_scoring(facts: Facts, scored: int) -> float | None:
    """Seconds of drawing for the scores at a run's end, those already drawn left out."""
    if not (images := _images(facts, "scores")):
        return 0.0
    image = seconds_an_image(facts)
    return None if image is None else image * max(0, images - scored)


def seconds_an_image(facts: Facts) -> float | None:
    """By the newest samples that the run has drawn; None before the first."""
    drawn = facts.get("drawing")
    if not isinstance(drawn, Mapping) or not drawn.get("images"):
        return None
    return float(drawn["seconds"]) / int(drawn["images"])


def pace_of(times: Sequence[float], otherwise: float) -> float:
    """Seconds a step took lately by the moments that steps ended at, what lies between two
    included; `otherwise` where none is behind another.
    """
    between = [after - before for before, after in pairwise(times[-PACED - 1 :]) if after > before]
    return median(between) if between else otherwise


def slower_with(strategy: str, args: Sequence[str], start: int, rehearses: bool) -> float:
    """How much longer a step takes once there is something to rehearse, at a run's first task; the
    pace of a run that `rehearses` already knows it.
    """
    if rehearses or strategy != REHEARSER or start:
        return 1.0
    given = dict(arg.partition("=")[::2] for arg in args)
    return 1.0 + 1.0 / int(given.get("every", 1))


def count_scored(folder: Path) -> int:
    """Images of a run's scores that are there."""
    return sum(1 for _ in (folder / "evaluation" / "images").rglob("*.png"))


def _planned(facts: Facts, name: str, otherwise: int) -> int:
    planned = (facts.get("steps") or {}).get(name)
    return int(planned) if planned else otherwise


def _images(facts: Facts, what: str) -> int:
    """Images that the run will draw, as its plan counted them; 0 where an older one did not."""
    found = facts.get("to_draw")
    return int(found.get(what) or 0) if isinstance(found, Mapping) else 0
