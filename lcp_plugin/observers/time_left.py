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
the parent included), and the least share bears no stop in it. Seconds an image are those of the
newest samples (run.json), the first before the first step. Loading the base anew for the scores,
their encoders and --export are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lcp_plugin.config.options import Options
from lcp_plugin.evaluation.scores import count_cells
from lcp_plugin.report.read import RunFacts
from lcp_plugin.watch.log import Facts

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

    position: int  # of the task in training among the run's, from 1
    step: int
    total: int  # steps of that task
    pace: float  # seconds a step


def estimate(run: RunFacts, facts: Facts, at: Standing) -> TimeLeft:
    """What is still to be done, in seconds. `facts`: run.json."""
    image = seconds_an_image(facts)
    own = [task for task in run.tasks if task.index > run.start]
    training = (at.total - at.step) * at.pace
    pace = at.pace * _rehearsing(run)
    training += sum(_planned(facts, task.name, at.total) for task in own[at.position :]) * pace
    training += _pauses(run, at.position, len(own))
    if image is not None:
        training += image * _option(facts, "samples_per_task") * (run.start + len(own))
    return TimeLeft(training, estimate_scoring(run, facts))


def estimate_scoring(run: RunFacts, facts: Facts) -> float | None:
    """Seconds of drawing for the scores at a run's end, those already drawn left out."""
    if not _options(facts).get("evaluate"):
        return 0.0
    image = seconds_an_image(facts)
    if image is None:
        return None
    drawn = sum(1 for _ in (run.folder / "evaluation" / "images").rglob("*.png"))
    return image * max(0, _count_images(run, facts) - drawn)


def seconds_an_image(facts: Facts) -> float | None:
    """By the newest samples that the run has drawn; None before the first."""
    drawn = facts.get("drawing")
    if not isinstance(drawn, Mapping) or not drawn.get("images"):
        return None
    return float(drawn["seconds"]) / int(drawn["images"])


def pace_of(steps: Sequence[Facts]) -> float:
    """Seconds a step took lately, what lies between two steps included."""
    times = [float(step.get("time") or 0.0) for step in steps[-PACED - 1 :]]
    between = [after - before for before, after in pairwise(times) if after > before > 0]
    return median(between) if between else float(steps[-1].get("seconds") or 0.0)


def _count_images(run: RunFacts, facts: Facts) -> int:
    """Images of every task at every state of the model that scores are made of, the base's too.
    Earlier tasks of a chain count where their run is still at hand.
    """
    source = Path(str((facts.get("parent") or {}).get("source") or ""))
    known = sum(task.index > run.start or source.is_dir() for task in run.tasks)
    prompts = max((len(task.get("prompts", ())) for task in facts.get("tasks", ())), default=0)
    prompts = min(prompts, int(_options(facts).get("evaluate_prompts") or prompts))
    return (count_cells(run.strategy, known) + known) * prompts * _option(facts, "evaluate_images")


def _rehearsing(run: RunFacts) -> float:
    """How much longer a step of the tasks to come takes than one of this task."""
    began = run.strategy == REHEARSER and run.start == 0
    if not began or any("rehearsal" in step for step in run.steps):
        return 1.0
    given = dict(arg.partition("=")[::2] for arg in run.strategy_args)
    return 1.0 + 1.0 / int(given.get("every", 1))


def _pauses(run: RunFacts, position: int, tasks: int) -> float:
    """Seconds between the tasks that are left."""
    shares = [
        (float(after["time"]) - float(before["time"])) / int(before["task_index"])
        for before, after in pairwise(run.steps)
        if before["task_index"] != after["task_index"] and "time" in before and "time" in after
    ]
    share = min((share for share in shares if share > 0), default=0.0)
    return share * sum(run.start + k for k in range(position, tasks))


def _planned(facts: Facts, name: str, otherwise: int) -> int:
    planned = (facts.get("steps") or {}).get(name)
    return int(planned) if planned else otherwise


def _options(facts: Facts) -> Mapping[str, Any]:
    found = facts.get("options")
    return found if isinstance(found, Mapping) else {}


def _option(facts: Facts, name: str) -> int:
    """A whole number among a run's options, its default included."""
    return int(_options(facts).get(name, getattr(Options, name)))
