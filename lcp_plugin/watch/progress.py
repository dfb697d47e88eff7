"""How far a run is, and how its losses go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lcp_plugin.report.read import RunFacts
from lcp_plugin.watch.log import Facts
from lcp_plugin.watch.time_left import Standing, TimeLeft, estimate, pace_of

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
    own = [task for task in run.tasks if task.index > run.start]
    position = index - run.start
    tasks = max(len(own), position)
    at = Standing(position, done, total, pace_of(mine))
    return Progress(
        task=str(latest.get("task", "")),
        position=position,
        tasks=tasks,
        step=done,
        total=total,
        pace=at.pace,
        left=estimate(run, facts, at),
        loss=_recent(mine, "loss"),
        rehearsal=_recent(mine, "rehearsal"),
        memory_mb=max(float(step.get("peak_memory_mb") or 0.0) for step in mine),
        is_over=last.get("event") == "task_end",
    )


def _recent(steps: Sequence[Facts], key: str) -> float | None:
    values = [step[key] for step in steps[-RECENT:] if isinstance(step.get(key), int | float)]
    return fmean(values) if values else None


def say_duration(seconds: float) -> str:
    """`40 s`, `7 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
