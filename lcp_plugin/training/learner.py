"""A lesson in progress: the live model, its optimizer, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.hooks import Carry
from lcp_plugin.sdxl.live_model import LiveModel
from lcp_plugin.sdxl.loss import LossSettings
from lcp_plugin.sdxl.noise import NoiseSettings
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.training.desk import TaskDesk
from lcp_plugin.training.draws import Draws
from lcp_plugin.training.lesson import Classroom, Lesson
from lcp_plugin.training.optimizers import has_modes
from lcp_plugin.training.updates import Updates


class Learner:
    """Made when the adapter is attached; the strategy's before_training is part of it."""

    def __init__(self, lesson: Lesson, room: Classroom) -> None:
        self.lesson, self.room = lesson, room
        self.total = lesson.data.total_steps(int(room.accelerator.num_processes))
        self.draws = Draws.of(lesson, room)
        self.noise = NoiseSettings.of(lesson.options)
        self.loss = LossSettings.of(lesson.options)
        self.step = 0  # optimizer steps done
        self.validation: list[list[float]] = []  # [step, loss]
        self.start_hash = _hash_start(lesson)
        desk = TaskDesk(lesson, room)
        self.model = LiveModel(room.base, lesson.task, lesson.carry.tasks, desk)
        room.base.adapted.eval()
        room.strategy.before_training(self.model)
        self.updates = Updates(lesson, room, self.total)
        self.model.train_through(self.updates.model)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.room.accelerator.is_main_process)

    def go_on_from(self, step: int, validation: list[list[float]]) -> None:
        """Factors and optimizer are those of a saved step."""
        self.step, self.validation = step, validation

    def count_step(self) -> None:
        """One more optimizer step is done."""
        self.step += 1

    def note_validation(self, loss: float) -> None:
        """The loss on held-out images after the steps so far."""
        self.validation.append([self.step, loss])

    def set_mode(self, mode: str) -> None:
        """train or eval, of the model and of optimizers that keep two sets of weights."""
        self.room.base.adapted.train(mode == "train")
        self.updates.set_mode(mode)

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch of the task's data on the device, everything encoded."""
        return self.room.base.complete(batch, self.lesson.options.trains_text_encoders)

    def predict_alone(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> Tensor:
        """The trained model's output, in this process alone."""
        return self.room.base.predict(noisy, timesteps, conditioning)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The model as it would be delivered, without dropout, while the block lasts.

        Optimizers that exchange two sets of weights get theirs back to the last bit.
        """
        parameters = self.updates.parameters if has_modes(self.updates.optimizer) else []
        kept = [parameter.detach().clone() for parameter in parameters]
        self.set_mode("eval")
        try:
            yield
        finally:
            self.updates.set_mode("train")
            self.room.base.adapted.train()
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)


def _hash_start(lesson: Lesson) -> str:
    """What tells the frozen base that a task starts on from another; "" where no state asks."""
    options = lesson.options
    asked = options.resume or options.save_state or options.save_state_on_train_end
    return hash_carry(Carry(lesson.start.base, biases=lesson.carry.biases)) if asked else ""
