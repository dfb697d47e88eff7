"""How far a run has come along its whole chain, while it trains; when it ends, `time_left` says.

run.json says how many steps each task has; where epochs decide it, the tasks that have begun stand
for the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from lcp_plugin.hooks import RunView, StepReport
from lcp_plugin.tasks import Task
from lcp_plugin.telling.time_left import (
    PACED,
    Standing,
    TimeLeft,
    count_scored,
    estimate,
    pace_of,
    slower_with,
)


class Course:
    """The steps of all tasks of a run, and where among them it is."""

    def __init__(self, run: RunView | None = None) -> None:
        self._run = run
        planned: Mapping[str, Any] = run.facts.get("steps", {}) if run else {}
        self._names = tuple(task.name for task in run.tasks) if run else ()
        self._steps = {name: int(count) for name, count in planned.items() if count}
        self._start = run.tasks[0].index - 1 if run and run.tasks else 0
        self._scored = count_scored(run.output_dir) if run else 0
        self._last: StepReport | None = None
        self._times: deque[float] = deque(maxlen=PACED + 1)  # when steps of the task ended
        self._pauses: list[float] = []  # seconds between two tasks / concepts known then
        self._rehearses = False
        self._at = 0  # position of the task in training

    def move(self, step: StepReport, now: float) -> None:
        """A step has ended at `now`, in seconds of any clock."""
        name, last = step.task.name, self._last
        self._at = self._names.index(name) if name in self._names else 0
        self._steps[name] = step.total
        if last is not None and last.task.name != name:
            pause = now - self._times[-1] - step.seconds
            self._pauses.append(pause / last.task.index)
            self._times.clear()
        self._times.append(now)
        self._rehearses |= step.rehearsal is not None
        self._last = step

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
        return sum(self._counts()[: self._at]) + (self._last.index if self._last else 0)

    @property
    def share(self) -> float:
        """Of all steps."""
        return self.done / self.total if self.total else 0.0

    @property
    def pace(self) -> float:
        """Seconds a step."""
        return pace_of(tuple(self._times), self._last.seconds if self._last else 0.0)

    @property
    def time_left(self) -> TimeLeft:
        """Until the run is done, its samples and scores included: an estimate."""
        if self._run is None or self._last is None:
            return TimeLeft(0.0)
        args = (self._run.facts.get("strategy") or {}).get("args", ())
        slower = slower_with(self._run.strategy.name, args, self._start, self._rehearses)
        at = Standing(
            self._names,
            self._at + 1,
            self._last.index,
            self._last.total,
            self.pace,
            self._start,
            tuple(self._pauses),
            slower,
            self._scored,
        )
        return estimate(self._run.facts, at)

    def _counts(self) -> list[int]:
        known = list(self._steps.values())
        usual = round(sum(known) / len(known)) if known else 0
        return [self._steps.get(name, usual) for name in self._names]
