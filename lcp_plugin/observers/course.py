"""How far a run has come along its whole chain, and when it will end.

    seconds left = steps left * pace + boundaries left * pause

`pace` is the smoothed time of a step, `pause` the mean of what lay between two tasks so far
(samples, files, images encoded and drawn); none is known before the first boundary. run.json says
how many steps each task has; where epochs decide it, the tasks that have begun stand for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from lcp_plugin.hooks import RunView, StepReport
from lcp_plugin.tasks import Task

FRESH = 0.1  # weight of the newest step in the pace


class Course:
    """The steps of all tasks of a run, and where among them it is."""

    def __init__(self, names: tuple[str, ...] = (), steps: Mapping[str, int] | None = None) -> None:
        self._names = names
        self._steps = dict(steps or {})  # of the tasks whose number is known
        self._at = 0  # position of the task in training
        self._index = 0  # steps of it that are done
        self._last: tuple[str, float] | None = None  # task of the last step, and when it ended
        self._pauses: list[float] = []
        self.pace = 0.0  # seconds a step

    @classmethod
    def of(cls, run: RunView) -> Course:
        """A run's course before its first step."""
        planned = run.facts.get("steps", {})
        known = {name: int(count) for name, count in planned.items() if count}
        return cls(tuple(task.name for task in run.tasks), known)

    def move(self, step: StepReport, now: float) -> None:
        """A step has ended at `now`, in seconds of any clock."""
        name = step.task.name
        self._at = self._names.index(name) if name in self._names else 0
        self._steps[name] = step.total
        self._index = step.index
        if self._last is not None and self._last[0] != name:
            self._pauses.append(max(0.0, now - self._last[1] - step.seconds))
        fresh = FRESH if self._last is not None and self._last[0] == name else 1.0
        self.pace = fresh * step.seconds + (1 - fresh) * self.pace
        self._last = (name, now)

    def describe(self, task: Task) -> str:
        """`2 of 5 dog`: the task's place among the run's."""
        place = self._names.index(task.name) + 1 if task.name in self._names else task.index
        return f"{place} of {max(len(self._names), 1)} {task.name}"

    @property
    def total(self) -> int:
        """Steps of all tasks; 0 where none is known yet."""
        return sum(self._counts())

    @property
    def done(self) -> int:
        """Steps that are behind, those of earlier tasks included."""
        return sum(self._counts()[: self._at]) + self._index

    @property
    def share(self) -> float:
        """Of all steps."""
        return self.done / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float:
        """Until the last task is learned."""
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else 0.0
        boundaries = max(len(self._names) - self._at - 1, 0)
        return (self.total - self.done) * self.pace + boundaries * pause

    def _counts(self) -> list[int]:
        known = list(self._steps.values())
        usual = round(sum(known) / len(known)) if known else 0
        return [self._steps.get(name, usual) for name in self._names]


def describe_end(seconds: float, now: float | None = None) -> str:
    """The clock at the end: "14:32", on another day "Sat 14:32", beyond a week its date."""
    now = time.time() if now is None else now
    here, then = time.localtime(now), time.localtime(now + seconds)
    if here[:3] == then[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if seconds < 6 * 86400 else "%Y-%m-%d", then)


def describe_duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
