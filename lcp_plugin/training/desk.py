"""What a lesson lends to the live model that its strategy sees (implements `sdxl.live.Desk`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from lcp_plugin.hooks import Item
from lcp_plugin.seeds import derive_seed
from lcp_plugin.training.lesson import Classroom, Lesson
from lcp_plugin.training.processes import share_tensors

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TaskDesk:
    """The lesson's examples, draws and store."""

    lesson: Lesson
    room: Classroom

    def sample(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """One image per prompt from the model as it is being trained."""
        return self.room.draw(prompts, seed)

    def generator(self, purpose: str) -> Generator:
        """For a strategy's draws outside of steps, derived from (seed, task, purpose)."""
        seed = derive_seed(self.room.seed, purpose, self.lesson.task.index)
        return torch.Generator().manual_seed(seed)

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar on a terminal and the time left."""
        from tqdm import tqdm

        quiet = None if self.room.accelerator.is_main_process and len(items) else True
        yield from tqdm(items, desc=what, unit="task", leave=False, disable=quiet)

    def sizes(self) -> list[tuple[int, int]]:
        """Latent sizes (h, w) of the task's buckets, the most frequent first."""
        factor, counts = self.room.base.vae_factor, self.lesson.data.bucket_counts
        ordered = sorted(counts, key=lambda bucket: (-counts[bucket], bucket))
        return [(height // factor, width // factor) for width, height in ordered]

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What rank 0 finds beside the task's state, or makes and leaves there, on every rank."""
        store, task, made = self.room.store, self.lesson.task, None
        if self.room.accelerator.is_main_process:
            made = store.read_kept(task, name)
            if made is None:
                made = make()
                store.write_kept(task, name, made)
        return share_tensors(self.room.accelerator, made)

    def examples(self) -> Iterator[Mapping[str, Tensor]]:
        """The task's examples once, on the device, everything encoded."""
        data, trains_texts = self.lesson.data, self.lesson.options.trains_text_encoders
        for k in range(data.num_batches_per_epoch):
            yield self.room.base.complete(data.batch(k), trains_texts)
