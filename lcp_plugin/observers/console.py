"""Progress on the console: where the whole chain stands, when it ends, and how the task goes.

On a terminal a bar over all steps of the run and one over the task's; elsewhere (a log file, a
pipe) a plain line now and then, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lcp_plugin.hooks import Carry, Observer, RunView, StepReport
from lcp_plugin.observers.course import Course
from lcp_plugin.tasks import Task
from lcp_plugin.telling.terminal import is_terminal, shows_colour
from lcp_plugin.telling.time_left import TimeLeft
from lcp_plugin.telling.wording import counted, say_duration, say_moment

SMOOTHING = 0.05  # of the running mean of the loss
SECONDS_BETWEEN_LINES = 20.0
RUN_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
TASK_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}"  # 80 columns cut it behind the losses
COLOUR = "green"


class Console(Observer):
    """Bars on a terminal, a plain line every 20 seconds elsewhere."""

    name = "console"

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._bar: Any = None
        self._run_bar: Any = None
        self._course = Course()
        self._loss: float | None = None
        self._peak = 0.0
        self._began = self._spoke = time.monotonic()

    def on_run_begin(self, run: RunView) -> None:
        """Opens the bar over the run, or says what begins."""
        title = f"{run.name} [{run.strategy.name}]"
        self._course = Course(run)
        if not self._terminal:
            names = ", ".join(task.name for task in run.tasks)
            many = counted(len(run.tasks), "task")
            self._say(f"{title}: {many} on {run.device}: {names}")
            return
        from tqdm import tqdm

        self._run_bar = tqdm(
            total=self._course.total or None,
            desc=title,
            position=0,
            bar_format=RUN_BAR if self._course.total else None,
            colour=COLOUR if shows_colour(sys.stderr) else None,
        )

    def on_task_begin(self, run: RunView, task: Task) -> None:
        """Forgets the last task; the bar opens with the first step, which knows their number."""
        self._close_bar()
        self._loss, self._peak = None, 0.0
        self._began = self._spoke = time.monotonic()

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Moves the bars, or now and then prints a line."""
        before = step.loss if self._loss is None else self._loss
        self._loss = (1 - SMOOTHING) * before + SMOOTHING * step.loss
        self._peak = max(self._peak, step.peak_memory_mb)
        self._course.move(step, time.monotonic())
        if self._terminal:
            self._move_bars(step)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self._say(
                f"{self._place(step.task)}: step {step.index}/{step.total}, "
                f"{self._course.share:.0%} of the run, {self._facts(step)}, "
                f"{self._course.pace:.2f} s/step, {tell_end(self._course.time_left)}"
            )

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """One line that stays."""
        self._say(f"{self._place(task)}: step {step}, validation loss {loss:.4f}")

    def on_task_end(self, run: RunView, task: Task, carry: Carry) -> None:
        """One line that stays: what the task cost."""
        self._close_bar()
        seconds = time.monotonic() - self._began
        cost = "was complete"
        if self._loss is not None:
            took = say_duration(seconds)
            cost = f"loss {self._loss:.4f}, {took}, peak {self._peak:,.0f} MB"
        self._say(f"{self._place(task)}: {cost}")

    def on_run_end(self, run: RunView) -> None:
        """Closes what is open."""
        self._close_all()

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """Closes what is open, so that the error stands on a line of its own."""
        self._close_all()

    def _place(self, task: Task) -> str:
        return f"task {self._course.describe(task)}"

    def _facts(self, step: StepReport) -> str:
        rehearsed = "" if step.rehearsal is None else f", rehearsal {step.rehearsal:.4f}"
        return f"loss {self._loss:.4f}{rehearsed}, peak {self._peak:,.0f} MB, lr {step.lr:.1e}"

    def _move_bars(self, step: StepReport) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=step.total,
                initial=step.index - 1,
                desc=self._place(step.task),
                leave=False,
                position=1,
                bar_format=TASK_BAR,
            )
        pace = f"{self._course.pace:.2f} s/step"
        self._bar.set_postfix_str(f"{pace}, {self._facts(step)}", refresh=False)
        self._bar.update(1)
        if self._run_bar is not None:
            self._run_bar.total = self._course.total
            self._run_bar.bar_format = RUN_BAR
            clock = say_moment(time.time() + self._course.time_left.seconds)
            self._run_bar.set_postfix_str(f"ends about {clock}", refresh=False)
            self._run_bar.update(self._course.done - self._run_bar.n)

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


def tell_end(left: TimeLeft) -> str:
    """When the run will be done, and what that is made of."""
    clock = say_moment(time.time() + left.seconds)
    told = f"{say_duration(left.seconds)} left by an estimate"
    if left.scoring is None:
        told += ", the scores on top"
    elif left.scoring:
        told += f", {say_duration(left.scoring)} of it for the scores"
    return f"ends about {clock} ({told})"
