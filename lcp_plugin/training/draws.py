"""Every random number of a task is derived from (seed, task index, purpose, micro-batch number).

With p processes and accumulation a, micro-batch m of step s on rank r is number (s a + m) p + r, so
that p processes see what one with accumulation a p sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator

from lcp_plugin.sdxl.devices import own_randomness
from lcp_plugin.seeds import derive_seed
from lcp_plugin.training.lesson import Classroom, Lesson


@dataclass(frozen=True)
class Draws:
    """The random numbers of one task on one process."""

    seed: int
    task: int  # its index along the chain
    accumulation: int
    processes: int
    rank: int
    device: torch.device

    @classmethod
    def of(cls, lesson: Lesson, room: Classroom) -> Draws:
        """Those of a lesson."""
        return cls(
            seed=room.seed,
            task=lesson.task.index,
            accumulation=lesson.options.gradient_accumulation_steps,
            processes=int(room.accelerator.num_processes),
            rank=int(room.accelerator.process_index),
            device=room.base.device,
        )

    def _seed(self, purpose: str, step: int, micro: int) -> int:
        number = (step * self.accumulation + micro) * self.processes + self.rank
        return derive_seed(self.seed, purpose, self.task, number)

    def generator(self, purpose: str, step: int, micro: int) -> Generator:
        """A CPU generator for one purpose of one micro-batch."""
        return torch.Generator().manual_seed(self._seed(purpose, step, micro))

    @contextmanager
    def seeded(self, purpose: str, step: int, micro: int) -> Iterator[None]:
        """torch's global generators (dropout uses them) seeded for a block, put back after it."""
        with own_randomness(self.device, self._seed(purpose, step, micro)):
            yield
