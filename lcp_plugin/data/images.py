"""Images on their way from `pictures` to a tensor in [-1, 1].

Resizing averages areas to shrink and uses Lanczos to enlarge, as kohya does.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.formats.pictures import has_alpha, open_upright

Size = tuple[int, int]  # (width, height) in pixels

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
}


def open_alpha(path: Path) -> Image.Image | None:
    """The upright image's transparency as "L" (255 is opaque), None if it has none."""
    image = open_upright(path)
    return image.convert("RGBA").getchannel("A") if has_alpha(image) else None


def open_mask(path: Path) -> Image.Image:
    """A mask image's red channel as "L"; 255 counts fully."""
    return open_upright(path).convert("RGB").getchannel("R")


def resize(image: Image.Image, size: Size, interpolation: str | None = None) -> Image.Image:
    """`image` at `size`; area to shrink and Lanczos to enlarge unless another filter is named."""
    if image.size == size:
        return image
    shrinks = size[0] * size[1] < image.size[0] * image.size[1]
    return image.resize(size, _FILTERS[interpolation or ("area" if shrinks else "lanczos")])


def change_colours(image: Image.Image, generator: random.Random) -> Image.Image:
    """Half of the time a hue shift of up to 16 degrees, half of the time a gamma of .95 to 1.05."""
    if generator.random() < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        shift = generator.randint(-11, 11)  # of 256 steps round the circle
        turned = np.asarray(hue, dtype=np.int16) + shift
        hue = Image.fromarray((turned % 256).astype(np.uint8))
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if generator.random() < 0.5:
        gamma = generator.uniform(0.95, 1.05)
        values = np.asarray(image, dtype=np.float64) / 255.0
        image = Image.fromarray((values**gamma * 255.0).round().astype(np.uint8))
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a tensor   # (3, height, width), fp32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return (values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def mask_to_tensor(mask: Image.Image) -> Tensor:
    """An "L" image as a tensor   # (1, height, width), fp32 in [0, 1]."""
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255.0
