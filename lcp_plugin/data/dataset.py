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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lcp_plugin.config.datasets import SubsetConfig
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.caches import DiskCache, check_finite, make_key
from lcp_plugin.data.captions import CaptionTime, drops, process_caption, varies
from lcp_plugin.data.examples import Example, Part, collect_examples
from lcp_plugin.data.images import (
    Size,
    change_colours,
    mask_to_tensor,
    open_alpha,
    open_image,
    open_mask,
    resize,
    to_tensor,
)
from lcp_plugin.errors import DataError
from lcp_plugin.seeds import derive_seed

EncodeImages = Callable[[Tensor], Tensor]  # (b, 3, h, w) in [-1, 1], fp32 -> scaled latents
EncodePrompts = Callable[[Sequence[str]], Mapping[str, Tensor]]

_PROMPTS_AT_ONCE = 8
_TEXT = ("encoder_hidden_states", "text_embeds")
_STACKED = ("latents", "pixels", *_TEXT, "time_ids", "loss_weights")


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
        part: Part = "train",
    ) -> None:
        self.task = task
        self.options = task.options
        self.seed = seed
        self.task_index = task_index
        sets = [collect_examples(d, resolution, part, seed) for d in task.datasets]
        self._sets = [s for s in sets if s.examples]
        if not self._sets and part == "train":
            raise DataError(f"task {task.name!r} has no images.")
        self._examples: list[list[Example]] = [list(s.examples) for s in self._sets]
        self.num_batches_per_epoch = sum(s.num_batches() for s in self._sets)
        self._plans: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        self._latents: dict[str, Tensor] = {}
        self._texts: dict[str, dict[str, Tensor]] = {}
        options = self.options
        self._latent_disk = DiskCache(
            cache_dir / "latents" if cache_dir and options.cache_latents_to_disk else None
        )
        self._text_disk = DiskCache(
            cache_dir / "text" if cache_dir and options.cache_text_encoder_outputs_to_disk else None
        )
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
        return tuple(dict.fromkeys(self._static_captions(regular=False)))

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
        return live or not self.options.cache_latents

    @property
    def needs_text_encoders(self) -> bool:
        """Whether the text encoders are needed in every step."""
        live = self.options.trains_text_encoders or any(varies(e.subset) for e in self._all())
        return live or not self.options.cache_text_encoder_outputs

    def _collect_notices(self) -> tuple[str, ...]:
        notices = [notice for s in self._sets for notice in s.notices]
        if self.options.cache_latents and self.needs_vae:
            notices.append(
                "cache_latents is set aside: random_crop or color_aug change images in every step."
            )
        if self.options.cache_text_encoder_outputs and self.needs_text_encoders:
            reason = (
                "text encoders are trained"
                if self.options.trains_text_encoders
                else "captions change from step to step"
            )
            notices.append(f"cache_text_encoder_outputs is set aside: {reason}.")
        return tuple(dict.fromkeys(notices))

    def steps_per_epoch(self, processes: int = 1) -> int:
        """Optimizer steps of an epoch (the last may have fewer micro-batches)."""
        together = processes * self.options.gradient_accumulation_steps
        return math.ceil(self.num_batches_per_epoch / together)

    def total_steps(self, processes: int = 1) -> int:
        """Optimizer steps of the task: max_train_epochs if given, else max_train_steps."""
        epochs = self.options.max_train_epochs
        return (
            self.options.max_train_steps
            if epochs is None
            else (epochs * self.steps_per_epoch(processes))
        )

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
        if encode_images is not None and not self.needs_vae:
            self._encode_all_images(encode_images, vae_key)
        if encode_prompts is not None and not self.needs_text_encoders:
            self._encode_all_captions(encode_prompts, text_key)

    def _encode_all_images(self, encode: EncodeImages, vae_key: str) -> None:
        waiting: dict[str, tuple[Example, bool]] = {}
        for example in self._all():
            for flipped in (False, True) if example.subset.flip_aug else (False,):
                name = _latent_name(example, flipped)
                cached = self._latent_disk.load(make_key(vae_key, name))
                if cached and set(cached) == {"latents"}:
                    self._latents[name] = cached["latents"]
                elif name not in self._latents:
                    waiting[name] = (example, flipped)
        groups: dict[Size, list[str]] = {}
        for name, (example, _) in waiting.items():
            groups.setdefault(example.placement.bucket, []).append(name)
        for names in groups.values():
            for start in range(0, len(names), self.options.vae_batch_size):
                chunk = names[start : start + self.options.vae_batch_size]
                self._encode_images(encode, vae_key, {n: waiting[n] for n in chunk})

    def _encode_images(
        self, encode: EncodeImages, vae_key: str, chunk: Mapping[str, tuple[Example, bool]]
    ) -> None:
        pixels = [_pixels(e, flipped, _centre(e))[0] for e, flipped in chunk.values()]
        latents = encode(torch.stack(pixels)).detach().to("cpu")
        for (name, (example, _)), latent in zip(chunk.items(), latents, strict=True):
            tensors = {"latents": latent.clone()}
            remedy = "the VAE overflows in half precision: use --no_half_vae or another VAE"
            check_finite(tensors, f"image {example.path}", remedy)
            self._latents[name] = tensors["latents"]
            self._latent_disk.store(make_key(vae_key, name), tensors)

    def _static_captions(self, regular: bool = True) -> list[str]:
        fixed = random.Random(0)
        captions = []
        for example in self._all():
            if regular or not example.subset.is_reg:
                plain = _undropped(example)
                captions.append(process_caption(example.caption, plain, fixed, CaptionTime()))
        return captions

    def _encode_all_captions(self, encode: EncodePrompts, text_key: str) -> None:
        wanted = dict.fromkeys(self._static_captions())
        if any(drops(e.subset) for e in self._all()):
            wanted[""] = None
        missing = []
        for caption in wanted:
            cached = self._text_disk.load(make_key(text_key, caption))
            if cached and set(cached) == set(_TEXT):
                self._texts[caption] = cached
            elif caption not in self._texts:
                missing.append(caption)
        for start in range(0, len(missing), _PROMPTS_AT_ONCE):
            chunk = missing[start : start + _PROMPTS_AT_ONCE]
            encoded = {k: v.detach().to("cpu") for k, v in encode(chunk).items()}
            for row, caption in enumerate(chunk):
                tensors = {k: encoded[k][row].clone() for k in _TEXT}
                check_finite(
                    tensors, f"caption {caption!r}", "try --mixed_precision bf16 or no instead"
                )
                self._texts[caption] = tensors
                self._text_disk.store(make_key(text_key, caption), tensors)

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

    def batch(self, k: int) -> dict[str, Any]:
        """Micro-batch k of the task, on the CPU.

        latents (b, 4, h, w), or pixels (b, 3, H, W) where the VAE is live;
        encoder_hidden_states and text_embeds, or captions (a list) where text encoders are live;
        time_ids (b, 6): original height and width, crop top and left, target height and width, all
        in pixels; loss_weights (b,); masks (b, 1, H, W) in [0, 1] if any image has one;
        preserve (b,) if any image asks for output preservation.
        """
        time = self._time(k)
        rows = []
        for place, example in enumerate(self.examples_of(k)):
            seed = derive_seed(self.seed, "example", self.task_index, k, place)
            rows.append(self._row(example, random.Random(seed), time))
        return _collate(rows)

    def _time(self, k: int) -> CaptionTime:
        return CaptionTime(
            epoch=k // self.num_batches_per_epoch,
            step=k // self.options.gradient_accumulation_steps,
            total_steps=self.total_steps(),
        )

    def _row(self, example: Example, draw: random.Random, time: CaptionTime) -> dict[str, Any]:
        subset = example.subset
        flipped = subset.flip_aug and draw.random() < 0.5
        crop = _random_crop(example, draw) if subset.random_crop else _centre(example)
        caption = process_caption(example.caption, subset, draw, time)
        row: dict[str, Any] = {"time_ids": _time_ids(example, crop)}
        weight = self.options.prior_loss_weight if subset.is_reg else 1.0
        row["loss_weights"] = torch.tensor(weight)
        latents = self._latents.get(_latent_name(example, flipped))
        if latents is not None and not self.needs_vae:
            row["latents"] = latents
            row["mask"] = _mask(example, flipped, crop)
        else:
            colours = draw if subset.color_aug else None
            row["pixels"], row["mask"] = _pixels(example, flipped, crop, colours)
        texts = self._texts.get(caption)
        if texts is not None and not self.needs_text_encoders:
            row.update(texts)
        else:
            row["captions"] = caption
        row["preserve"] = bool(subset.custom_attributes.get("diff_output_preservation", False))
        return row

    def loader(
        self, start: int, stop: int, workers: int, stride: int = 1, offset: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches start + offset, start + offset + stride, ... below stop.

        Worker processes are started only where images must be read in every step.
        """
        indices = range(start + offset, stop, stride)
        workers = min(workers, len(indices), os.cpu_count() or 1) if self.needs_vae else 0
        if workers <= 0:
            return (self.batch(k) for k in indices)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        return iter(loader)


class _Batches(Dataset[dict[str, Any]]):
    """Batches by their index, for worker processes."""

    def __init__(self, data: TaskData) -> None:
        self._data = data

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._data.batch(index)


def _undropped(example: Example) -> SubsetConfig:
    return replace(
        example.subset,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        shuffle_caption=False,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def _latent_name(example: Example, flipped: bool) -> str:
    """What latents depend on besides the VAE."""
    placement = example.placement
    return make_key(
        example.content,
        placement.bucket,
        placement.resized,
        example.subset.resize_interpolation,
        "flipped" if flipped else "upright",
    )


def _centre(example: Example) -> tuple[int, int]:
    """(left, top) of the central crop, pixels of the resized image."""
    width, height = example.placement.slack
    return width // 2, height // 2


def _random_crop(example: Example, draw: random.Random) -> tuple[int, int]:
    width, height = example.placement.slack
    return draw.randint(0, width), draw.randint(0, height)


def _time_ids(example: Example, crop: tuple[int, int]) -> Tensor:
    """SDXL's size conditioning; the crop is in pixels of the resized (and mirrored) image."""
    (width, height), (left, top) = example.size, crop
    target = example.placement.bucket
    return torch.tensor([height, width, top, left, target[1], target[0]], dtype=torch.float32)


def _fit(image: Image.Image, example: Example, flipped: bool, crop: tuple[int, int]) -> Image.Image:
    image = resize(image, example.placement.resized, example.subset.resize_interpolation)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    (left, top), (width, height) = crop, example.placement.bucket
    return image.crop((left, top, left + width, top + height))


def _pixels(
    example: Example,
    flipped: bool,
    crop: tuple[int, int],
    colours: random.Random | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The image as it is trained, (3, height, width) in [-1, 1], and its mask."""
    image = _fit(open_image(example.path), example, flipped, crop)
    if colours is not None:
        image = change_colours(image, colours)
    return to_tensor(image), _mask(example, flipped, crop)


def _mask(example: Example, flipped: bool, crop: tuple[int, int]) -> Tensor | None:
    """What weighs the loss, (1, height, width) in [0, 1]; None where everything counts."""
    if example.mask is not None:
        mask = open_mask(example.mask)
    elif example.subset.alpha_mask:
        alpha = open_alpha(example.path)
        if alpha is None:
            return None
        mask = alpha
    else:
        return None
    return mask_to_tensor(_fit(mask, example, flipped, crop))


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    batch: dict[str, Any] = {k: torch.stack([r[k] for r in rows]) for k in _STACKED if k in first}
    if "captions" in first:
        batch["captions"] = [r["captions"] for r in rows]
    masks = [r["mask"] for r in rows]
    if any(m is not None for m in masks):
        shape = next(m.shape for m in masks if m is not None)
        batch["masks"] = torch.stack([torch.ones(shape) if m is None else m for m in masks])
    if any(r["preserve"] for r in rows):
        batch["preserve"] = torch.tensor([r["preserve"] for r in rows])
    return batch
