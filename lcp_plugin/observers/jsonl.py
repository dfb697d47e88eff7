"""One JSON line per step and event in `<run>/logs/steps.jsonl`.

After a kill some steps are repeated, and so are their lines: `read_steps` takes the last.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lcp_plugin.errors import DiskError
from lcp_plugin.hooks import Carry, Observer, RunView, StepReport
from lcp_plugin.tasks import Task


class JsonLines(Observer):
    """Writes logs/steps.jsonl: loss, rate, seconds and memory by step, validation, ends."""

    name = "jsonl"

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path: Path | None = None

    def on_run_begin(self, run: RunView) -> None:
        """Opens the file for appending."""
        self._path = Path(run.output_dir) / "logs" / "steps.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)  # by lines

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """One line per optimizer step."""
        self._write(
            event="step",
            task=step.task.name,
            task_index=step.task.index,
            step=step.index,
            total=step.total,
            loss=step.loss,
            objective=step.objective,
            **({} if step.rehearsal is None else {"rehearsal": step.rehearsal}),
            lr=step.lr,
            seconds=round(step.seconds, 4),
            peak_memory_mb=round(step.peak_memory_mb, 1),
        )

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """One line per measurement."""
        self._write(event="validation", task=task.name, task_index=task.index, step=step, loss=loss)

    def on_task_end(self, run: RunView, task: Task, carry: Carry) -> None:
        """One line per task; the file is flushed."""
        self._write(
            event="task_end", task=task.name, task_index=task.index, learned=len(carry.tasks)
        )
        if self._file is not None:
            self._file.flush()

    def on_run_end(self, run: RunView) -> None:
        """Closes the file."""
        self._write(event="run_end")
        self._close()

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """Notes the error and closes the file; a full disk takes no note of itself."""
        with suppress(DiskError):
            self._write(event="error", error=type(error).__name__, message=str(error))
        self._close()

    def _write(self, **facts: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")
        except OSError as error:
            self._close()
            raise DiskError(
                f"{self._path} could not be written ({error.strerror or error}); what was learned "
                "so far is whole. Free some space and run the same command again."
            ) from error

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be written was told of
                file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The step lines of a log; of a step that was repeated after a kill, the last one counts."""
    return _read_events(path, "step")


def read_validation(path: Path) -> list[dict[str, Any]]:
    """The validation lines of a log, the last of each step."""
    return _read_events(path, "validation")


def _read_events(path: Path, event: str) -> list[dict[str, Any]]:
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                fact = json.loads(line)
                if fact["event"] == event:
                    steps[int(fact["task_index"]), int(fact["step"])] = fact
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill, or another program's
    return [steps[key] for key in sorted(steps)]
