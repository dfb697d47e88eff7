"""One row of a batch: the image resized, mirrored and cropped, its mask, its size conditioning."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.data.caches import make_key
from lcp_plugin.data.examples import Example
from lcp_plugin.data.images import (
    change_colours,
    mask_to_tensor,
    open_alpha,
    open_mask,
    resize,
    to_tensor,
)
from lcp_plugin.formats.pictures import open_rgb

TEXT = ("encoder_hidden_states", "text_embeds")
STACKED = ("latents", "pixels", *TEXT, "time_ids", "loss_weights")


def latent_name(example: Example, flipped: bool) -> str:
    """What latents depend on besides the VAE."""
    placement = example.placement
    return make_key(
        example.content,
        placement.bucket,
        placement.resized,
        example.subset.resize_interpolation,
        "flipped" if flipped else "upright",
    )


def centre_crop(example: Example) -> tuple[int, int]:
    """(left, top) of the central crop, pixels of the resized image."""
    width, height = example.placement.slack
    return width // 2, height // 2


def random_crop(example: Example, draw: random.Random) -> tuple[int, int]:
    """(left, top) anywhere within the resized image."""
    width, height = example.placement.slack
    return draw.randint(0, width), draw.randint(0, height)


def time_ids(example: Example, crop: tuple[int, int]) -> Tensor:
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


def read_pixels(
    example: Example,
    flipped: bool,
    crop: tuple[int, int],
    colours: random.Random | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The image as it is trained, (3, height, width) in [-1, 1], and its mask."""
    image = _fit(open_rgb(example.path), example, flipped, crop)
    if colours is not None:
        image = change_colours(image, colours)
    return to_tensor(image), read_mask(example, flipped, crop)


def read_mask(example: Example, flipped: bool, crop: tuple[int, int]) -> Tensor | None:
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


def collate_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a batch stacked; images without a mask count fully."""
    first = rows[0]
    batch: dict[str, Any] = {k: torch.stack([r[k] for r in rows]) for k in STACKED if k in first}
    if "captions" in first:
        batch["captions"] = [r["captions"] for r in rows]
    masks = [r["mask"] for r in rows]
    if any(m is not None for m in masks):
        shape = next(m.shape for m in masks if m is not None)
        batch["masks"] = torch.stack([torch.ones(shape) if m is None else m for m in masks])
    if any(r["preserve"] for r in rows):
        batch["preserve"] = torch.tensor([r["preserve"] for r in rows])
    return batch
