"""Progress on the console: one bar over the run, with task, step, loss, rate, pace and peak
memory.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lcp_plugin.hooks import Carry, Observer, RunView, StepReport
from lcp_plugin.tasks import Task

SMOOTHING = 0.05  # of the running mean of the loss


class Console(Observer):
    """A tqdm bar per task inside a bar over the run; plain lines where the output is not a
    terminal.
    """

    name = "console"

    def __init__(self) -> None:
        self._bar: Any = None
        self._run_bar: Any = None
        self._loss: float | None = None
        self._peak = 0.0
        self._began = 0.0

    def on_run_begin(self, run: RunView) -> None:
        """Opens the bar over the run."""
        from tqdm import tqdm

        self._run_bar = tqdm(
            total=len(run.tasks),
            desc=f"{run.name} [{run.strategy.name}]",
            unit="task",
            disable=not sys.stderr.isatty(),
            position=0,
        )

    def on_task_begin(self, run: RunView, task: Task) -> None:
        """Names the task; its bar opens with the first step, which knows the number of steps."""
        self._close_bar()
        self._loss, self._peak, self._began = None, 0.0, time.monotonic()

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Moves the bar."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=step.total,
                initial=step.index - 1,
                desc=f"task {step.task.index} {step.task.name}",
                unit="step",
                leave=False,
                position=1,
                mininterval=0.5 if sys.stderr.isatty() else 15,
            )
        before = step.loss if self._loss is None else self._loss
        self._loss = (1 - SMOOTHING) * before + SMOOTHING * step.loss
        self._peak = max(self._peak, step.peak_memory_mb)
        self._bar.set_postfix_str(
            f"loss {self._loss:.4f}, lr {step.lr:.1e}, peak {self._peak:,.0f} MB", refresh=False
        )
        self._bar.update(1)

    def on_task_end(self, run: RunView, task: Task, carry: Carry) -> None:
        """One line that stays: what the task cost."""
        from tqdm import tqdm

        self._close_bar()
        loss = "resumed at its end" if self._loss is None else f"loss {self._loss:.4f}"
        seconds = time.monotonic() - self._began
        tqdm.write(
            f"task {task.index} {task.name}: {loss}, {seconds:.0f} s, peak {self._peak:,.0f} MB",
            file=sys.stderr,
        )
        if self._run_bar is not None:
            self._run_bar.update(1)

    def on_run_end(self, run: RunView) -> None:
        """Closes what is open."""
        self._close_all()

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """Closes what is open, so that the error stands on a line of its own."""
        self._close_all()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_all(self) -> None:
        self._close_bar()
        if self._run_bar is not None:
            self._run_bar.close()
            self._run_bar = None
