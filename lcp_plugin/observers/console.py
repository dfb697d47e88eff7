"""Progress on the console: task, step, loss, rate, pace, time left and peak memory.

On a terminal a tqdm bar per task under a bar over the run; elsewhere (a log file, a pipe) a plain
line now and then, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lcp_plugin.hooks import Carry, Observer, RunView, StepReport
from lcp_plugin.tasks import Task

SMOOTHING = 0.05  # of the running mean of the loss
SECONDS_BETWEEN_LINES = 20.0


class Console(Observer):
    """Bars on a terminal, a plain line every 20 seconds elsewhere."""

    name = "console"

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._run_bar: Any = None
        self._loss: float | None = None
        self._pace = 0.0  # seconds a step, smoothed
        self._peak = 0.0
        self._began = self._spoke = time.monotonic()

    def on_run_begin(self, run: RunView) -> None:
        """Opens the bar over the run, or says what begins."""
        title = f"{run.name} [{run.strategy.name}]"
        if not self._terminal:
            names = ", ".join(task.name for task in run.tasks)
            self._say(f"{title}: {len(run.tasks)} task(s) on {run.device}: {names}")
            return
        from tqdm import tqdm

        self._run_bar = tqdm(total=len(run.tasks), desc=title, unit="task", position=0)

    def on_task_begin(self, run: RunView, task: Task) -> None:
        """Forgets the last task; the bar opens with the first step, which knows their number."""
        self._close_bar()
        self._loss, self._pace, self._peak = None, 0.0, 0.0
        self._began = self._spoke = time.monotonic()

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Moves the bar, or now and then prints a line."""
        before = step.loss if self._loss is None else self._loss
        self._pace = step.seconds if self._loss is None else 0.9 * self._pace + 0.1 * step.seconds
        self._loss = (1 - SMOOTHING) * before + SMOOTHING * step.loss
        self._peak = max(self._peak, step.peak_memory_mb)
        if self._terminal:
            self._move_bar(step)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            left = (step.total - step.index) * self._pace
            self._say(
                f"task {step.task.index} {step.task.name}: step {step.index}/{step.total}, "
                f"{self._facts(step)}, {self._pace:.2f} s/step, {left:.0f} s left"
            )

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """One line that stays."""
        self._say(f"task {task.index} {task.name}: step {step}, validation loss {loss:.4f}")

    def on_task_end(self, run: RunView, task: Task, carry: Carry) -> None:
        """One line that stays: what the task cost."""
        self._close_bar()
        seconds = time.monotonic() - self._began
        cost = (
            "was complete"
            if self._loss is None
            else (f"loss {self._loss:.4f}, {seconds:.0f} s, peak {self._peak:,.0f} MB")
        )
        self._say(f"task {task.index} {task.name}: {cost}")
        if self._run_bar is not None:
            self._run_bar.update(1)

    def on_run_end(self, run: RunView) -> None:
        """Closes what is open."""
        self._close_all()

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """Closes what is open, so that the error stands on a line of its own."""
        self._close_all()

    def _facts(self, step: StepReport) -> str:
        rehearsed = "" if step.rehearsal is None else f", rehearsal {step.rehearsal:.4f}"
        return f"loss {self._loss:.4f}{rehearsed}, lr {step.lr:.1e}, peak {self._peak:,.0f} MB"

    def _move_bar(self, step: StepReport) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=step.total,
                initial=step.index - 1,
                desc=f"task {step.task.index} {step.task.name}",
                unit="step",
                leave=False,
                position=1,
            )
        self._bar.set_postfix_str(self._facts(step), refresh=False)
        self._bar.update(1)

    def _say(self, line: str) -> None:
        if self._terminal:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_all(self) -> None:
        self._close_bar()
        if self._run_bar is not None:
            self._run_bar.close()
            self._run_bar = None
