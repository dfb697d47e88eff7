"""A task's data: every batch is a pure function of (seed, task index, micro-batch index).

An epoch has the batches of every bucket (`ceil(images / batch size)` each); the images of a bucket
and the batches of an epoch are shuffled anew for each epoch. Flips, crops, colours and captions are
drawn per batch index and place in the batch, so that a resumed run, and any number of worker
processes, get the same data.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lcp_plugin.config.options import Options
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.captions import CaptionTime, process_caption
from lcp_plugin.data.encodings import (
    EncodeImages,
    EncodePrompts,
    Encodings,
    EncodingSettings,
    static_caption,
)
from lcp_plugin.data.examples import Example, Split, collect_examples
from lcp_plugin.data.images import Size
from lcp_plugin.data.rows import (
    centre_crop,
    collate_rows,
    latent_name,
    random_crop,
    read_mask,
    read_pixels,
    time_ids,
)
from lcp_plugin.errors import DataError
from lcp_plugin.seeds import derive_seed


@dataclass(frozen=True)
class DataSettings:
    """What a task's data are cached of, and how long they are trained on."""

    caches_latents: bool
    caches_texts: bool
    trains_texts: bool
    accumulation: int  # micro-batches in an optimizer step
    epochs: int | None  # of the task; beats `steps`
    steps: int
    prior_weight: float  # of regularisation images' losses

    @classmethod
    def of(cls, options: Options) -> DataSettings:
        """What the options ask for."""
        return cls(
            caches_latents=options.cache_latents,
            caches_texts=options.cache_text_encoder_outputs,
            trains_texts=options.trains_text_encoders,
            accumulation=options.gradient_accumulation_steps,
            epochs=options.max_train_epochs,
            steps=options.max_train_steps,
            prior_weight=options.prior_loss_weight,
        )


class TaskData:
    """The images and captions of one task. Raises DataError for those that cannot be read.

    `resolution` (width, height) is the base's native size, for data sets that name none.
    `cache_dir` holds caches on disk where the options ask for them.
    """

    def __init__(
        self,
        task: TaskConfig,
        seed: int,
        task_index: int,
        resolution: Size,
        cache_dir: Path | None = None,
        part: Split = "train",
    ) -> None:
        self.task = task
        self._settings = DataSettings.of(task.options)
        self.seed = seed
        self.task_index = task_index
        used = [d.resolution or resolution for d in task.datasets]
        self.resolution = max(used, key=math.prod, default=resolution)  # the largest of all
        sets = [collect_examples(d, resolution, part, seed) for d in task.datasets]
        self._sets = [s for s in sets if s.examples]
        self.native = resolution
        self.examples_by_dataset = tuple(zip(task.datasets, sets, strict=True))
        if not self._sets and part == "train":
            raise DataError(f"task {task.name!r} has no images{_why_none(task)}.")
        self._examples: list[list[Example]] = [list(s.examples) for s in self._sets]
        self.num_batches_per_epoch = sum(s.num_batches() for s in self._sets)
        self._plans: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        self._encodings = Encodings(EncodingSettings.of(task.options, cache_dir))
        self.notices = self._collect_notices()

    # What there is

    def _all(self) -> Iterator[Example]:
        for examples in self._examples:
            yield from examples

    @property
    def num_images(self) -> int:
        """Training images, each once."""
        return sum(not e.subset.is_reg for e in self._all())

    @property
    def num_reg_images(self) -> int:
        """Regularisation images in use, each once."""
        return sum(e.subset.is_reg for e in self._all())

    @property
    def num_repeated_images(self) -> int:
        """Images of an epoch, with repeats."""
        return sum(e.repeats for e in self._all())

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """Training images, each once, in order."""
        return tuple(dict.fromkeys(e.path for e in self._all() if not e.subset.is_reg))

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions of training images as an encoder gets them, without what is random."""
        training = (e for e in self._all() if not e.subset.is_reg)
        return tuple(dict.fromkeys(static_caption(e) for e in training))

    @property
    def bucket_counts(self) -> dict[Size, int]:
        """Bucket (width, height) -> images of an epoch, with repeats."""
        counts: dict[Size, int] = {}
        for example in self._all():
            bucket = example.placement.bucket
            counts[bucket] = counts.get(bucket, 0) + example.repeats
        return dict(sorted(counts.items()))

    @property
    def fingerprint(self) -> str:
        """sha256 over contents of images and masks, captions and repeats; paths do not count."""
        lines = [f"{e.content} {e.repeats} {e.subset.is_reg} {e.caption!r}" for e in self._all()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def needs_vae(self) -> bool:
        """Whether the VAE is needed in every step."""
        live = any(e.subset.random_crop or e.subset.color_aug for e in self._all())
        return live or not self._settings.caches_latents

    @property
    def needs_text_encoders(self) -> bool:
        """Whether the text encoders are needed in every step."""
        live = self._settings.trains_texts or any(e.caption_settings.varies for e in self._all())
        return live or not self._settings.caches_texts

    def _collect_notices(self) -> tuple[str, ...]:
        notices = [notice for s in self._sets for notice in s.notices]
        if self._settings.caches_latents and self.needs_vae:
            notices.append(
                "cache_latents is set aside: random_crop or color_aug change images in every step."
            )
        if self._settings.caches_texts and self.needs_text_encoders:
            reason = (
                "text encoders are trained"
                if self._settings.trains_texts
                else "captions change from step to step"
            )
            notices.append(f"cache_text_encoder_outputs is set aside: {reason}.")
        return tuple(dict.fromkeys(notices))

    def steps_per_epoch(self, processes: int = 1) -> int:
        """Optimizer steps of an epoch (the last may have fewer micro-batches)."""
        together = processes * self._settings.accumulation
        return math.ceil(self.num_batches_per_epoch / together)

    def total_steps(self, processes: int = 1) -> int:
        """Optimizer steps of the task: max_train_epochs if given, else max_train_steps."""
        epochs = self._settings.epochs
        return epochs * self.steps_per_epoch(processes) if epochs else self._settings.steps

    # Encoding once

    def prepare(
        self,
        encode_images: EncodeImages | None,
        encode_prompts: EncodePrompts | None,
        vae_key: str,
        text_key: str,
    ) -> None:
        """Fill the caches that the options allow; the encoders may leave memory afterwards.

        `encode_images` returns scaled latents (b, 4, h/8, w/8); `encode_prompts` returns
        encoder_hidden_states (b, tokens, c) and text_embeds (b, d). The keys name the encoders, for
        caches on disk. Raises NumericError if an encoder gives NaN.
        """
        examples = list(self._all())
        if encode_images is not None and not self.needs_vae:
            self._encodings.encode_images(examples, encode_images, vae_key)
        if encode_prompts is not None and not self.needs_text_encoders:
            self._encodings.encode_captions(examples, encode_prompts, text_key)

    # Batches

    def _plan(self, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
        """The epoch's batches in order: (data set, indices of its examples)."""
        if epoch not in self._plans:
            generator = random.Random(derive_seed(self.seed, "order", self.task_index, epoch))
            plan: list[tuple[int, tuple[int, ...]]] = []
            for number, one in enumerate(self._sets):
                for indices in one.buckets().values():
                    generator.shuffle(indices)
                    size = one.batch_size
                    plan += [
                        (number, tuple(indices[i : i + size])) for i in range(0, len(indices), size)
                    ]
            generator.shuffle(plan)
            self._plans = {epoch: plan}  # only the newest is kept
        return self._plans[epoch]

    def examples_of(self, k: int) -> list[Example]:
        """The examples of micro-batch k."""
        epoch, place = divmod(k, self.num_batches_per_epoch)
        number, indices = self._plan(epoch)[place]
        return [self._examples[number][i] for i in indices]

    def batch(self, k: int, processes: int = 1) -> dict[str, Any]:
        """Micro-batch k of the task, of which `processes` take one each at a time; on the CPU.

        latents (b, 4, h, w), or pixels (b, 3, H, W) where the VAE is live;
        encoder_hidden_states and text_embeds, or captions (a list) where text encoders are live;
        time_ids (b, 6): original height and width, crop top and left, target height and width, all
        in pixels; loss_weights (b,); masks (b, 1, H, W) in [0, 1] if any image has one;
        preserve (b,) if any image asks for output preservation.
        """
        time = self._time(k, processes)
        rows = []
        for place, example in enumerate(self.examples_of(k)):
            seed = derive_seed(self.seed, "example", self.task_index, k, place)
            rows.append(self._row(example, random.Random(seed), time))
        return collate_rows(rows)

    def _time(self, k: int, processes: int) -> CaptionTime:
        return CaptionTime(
            epoch=k // self.num_batches_per_epoch,
            step=k // (processes * self._settings.accumulation),
            total_steps=self.total_steps(processes),
        )

    def _row(self, example: Example, draw: random.Random, time: CaptionTime) -> dict[str, Any]:
        subset = example.subset
        flipped = subset.flip_aug and draw.random() < 0.5
        crop = random_crop(example, draw) if subset.random_crop else centre_crop(example)
        caption = process_caption(example.caption, example.caption_settings, draw, time)
        row: dict[str, Any] = {"time_ids": time_ids(example, crop)}
        weight = self._settings.prior_weight if subset.is_reg else 1.0
        row["loss_weights"] = torch.tensor(weight)
        latents = self._encodings.latents.get(latent_name(example, flipped))
        if latents is not None and not self.needs_vae:
            row["latents"] = latents
            row["mask"] = read_mask(example, flipped, crop)
        else:
            colours = draw if subset.color_aug else None
            row["pixels"], row["mask"] = read_pixels(example, flipped, crop, colours)
        texts = self._encodings.texts.get(caption)
        if texts is not None and not self.needs_text_encoders:
            row.update(texts)
        else:
            row["captions"] = caption
        row["preserve"] = bool(subset.custom_attributes.get("diff_output_preservation", False))
        return row

    def loader(
        self, start: int, stop: int, workers: int, stride: int = 1, offset: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches start + offset, start + offset + stride, ... below stop; `stride` processes.

        Worker processes are started only where images must be read in every step.
        """
        indices = range(start + offset, stop, stride)
        workers = min(workers, len(indices), count_cores()) if self.needs_vae else 0
        if workers <= 0:
            return (self.batch(k, stride) for k in indices)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            _Batches(self, stride),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        return iter(loader)


def _why_none(task: TaskConfig) -> str:
    """What left a task without images, where a setting did."""
    if all(subset.is_reg for dataset in task.datasets for subset in dataset.subsets):
        return " but for regularisation (is_reg)"
    skips = any(dataset.skip_image_resolution for dataset in task.datasets)
    return " of more pixels than skip_image_resolution has" if skips else ""


def count_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Batches(Dataset[dict[str, Any]]):
    """Batches by their index, for worker processes."""

    def __init__(self, data: TaskData, processes: int) -> None:
        self._data, self._processes = data, processes

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._data.batch(index, self._processes)
