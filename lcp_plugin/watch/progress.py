"""How far a run is, and how its losses go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from lcp_plugin.report.read import RunFacts
from lcp_plugin.telling.time_left import (
    Standing,
    TimeLeft,
    count_scored,
    estimate,
    pace_of,
    slower_with,
)
from lcp_plugin.watch.log import Facts

RECENT = 25  # steps that a loss is the mean of


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    task: str  # name of the one that trains, or trained last
    position: int  # of it among the run's tasks, from 1
    tasks: int
    step: int
    total: int
    pace: float  # seconds a step
    left: TimeLeft  # of the run, its scores included
    loss: float | None
    rehearsal: float | None
    memory_mb: float  # peak
    is_over: bool  # the task: saved, and its samples are drawn

    @property
    def share(self) -> float:
        """Of the task's steps."""
        return min(1.0, self.step / self.total) if self.total else 0.0


def measure(run: RunFacts, facts: Facts, latest: Facts, last: Facts) -> Progress | None:
    """Where a run stands by run.json, the newest step and the last line of its log; None before
    the first step.

    A run that went on from a saved state repeats steps: those ahead of it do not count.
    """
    if not latest:
        return None
    index, done, total = (int(latest.get(key) or 0) for key in ("task_index", "step", "total"))
    mine = [s for s in run.steps if int(s["task_index"]) == index and int(s["step"]) <= done]
    at = stand(run, mine, latest)
    return Progress(
        task=str(latest.get("task", "")),
        position=at.position,
        tasks=max(len(at.tasks), at.position),
        step=done,
        total=total,
        pace=at.pace,
        left=estimate(facts, at),
        loss=_recent(mine, "loss"),
        rehearsal=_recent(mine, "rehearsal"),
        memory_mb=max(float(step.get("peak_memory_mb") or 0.0) for step in mine),
        is_over=last.get("event") == "task_end",
    )


def stand(run: RunFacts, mine: Sequence[Facts], latest: Facts) -> Standing:
    """Where a run stands, as far as its time goes; `mine`: the steps of the task in training."""
    times = [float(step.get("time") or 0.0) for step in mine]
    rehearses = any("rehearsal" in step for step in run.steps)
    return Standing(
        tasks=tuple(task.name for task in run.tasks if task.index > run.start),
        position=int(latest["task_index"]) - run.start,
        step=int(latest["step"]),
        total=int(latest.get("total") or 0),
        pace=pace_of(times, float(latest.get("seconds") or 0.0)),
        start=run.start,
        pauses=_pauses(run.steps),
        slower=slower_with(run.strategy, run.strategy_args, run.start, rehearses),
        scored=count_scored(run.folder),
    )


def _pauses(steps: Sequence[Facts]) -> tuple[float, ...]:
    """Between the last step of a task and the first of the next, by the concepts known then."""
    return tuple(
        (float(after["time"]) - float(before["time"])) / int(before["task_index"])
        for before, after in pairwise(steps)
        if before["task_index"] != after["task_index"] and "time" in before and "time" in after
    )


def _recent(steps: Sequence[Facts], key: str) -> float | None:
    values = [step[key] for step in steps[-RECENT:] if isinstance(step.get(key), int | float)]
    return fmean(values) if values else None
