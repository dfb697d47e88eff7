"""accelerate's trackers (--log_with tensorboard | wandb | all): loss, rate and sample grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from lcp_plugin.errors import DiskError
from lcp_plugin.hooks import Observer, RunView, StepReport
from lcp_plugin.tasks import Task

if TYPE_CHECKING:
    from PIL.Image import Image


class Logger(Protocol):
    """The part of an accelerator that logs."""

    trackers: list[Any]

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers for the trackers."""

    def end_training(self) -> None:
        """Ends the trackers."""


@contextmanager
def _one_line() -> Iterator[None]:
    """A tracker that cannot write is one line: DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"log_with: a tracker could not write ({error.strerror or error}); what was learned so "
            "far is whole. Free some space, or leave log_with out, and run the same command again."
        ) from error


class Trackers(Observer):
    """Logs losses, validation losses, rates and samples to the accelerator's trackers."""

    name = "trackers"

    def __init__(self, accelerator: Logger | None = None) -> None:
        self._accelerator = accelerator  # given by the runner; None logs nowhere
        self._steps = 0

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Scalars on one axis that runs through all tasks."""
        self._steps += 1
        self._log(
            {
                "loss/current": step.loss,
                f"loss/{step.task.name}": step.loss,
                **({} if step.rehearsal is None else {"loss/rehearsal": step.rehearsal}),
                "lr": step.lr,
                "peak_memory_mb": step.peak_memory_mb,
            }
        )

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """On the same axis."""
        self._log({f"loss/validation/{task.name}": loss})

    def on_sample(
        self, run: RunView, task: Task | None, images: Mapping[str, Sequence[Image]]
    ) -> None:
        """Images under samples/<task>, where the tracker takes images."""
        import numpy as np

        if self._accelerator is None:
            return
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                for name, pictures in images.items():
                    stack = np.stack([np.asarray(p) for p in pictures])
                    with _one_line():
                        tracker.writer.add_images(
                            f"samples/{name}", stack, self._steps, dataformats="NHWC"
                        )

    def on_run_end(self, run: RunView) -> None:
        """Ends the trackers; what was learned is on disk, whatever they say."""
        if self._accelerator is not None:
            with _one_line():
                self._accelerator.end_training()

    def _log(self, values: dict[str, Any]) -> None:
        if self._accelerator is not None:
            with _one_line():
                self._accelerator.log(values, step=self._steps)

    def state_dict(self) -> dict[str, Any]:
        """The position on the axis."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The position on the axis where a killed run left it."""
        self._steps = int(state.get("steps", 0))
