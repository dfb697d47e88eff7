"""Images from disk, upright and in RGB, and their way to a tensor in [-1, 1].

EXIF orientation is applied and transparent pixels are laid on white (kohya keeps whatever colour
lies beneath them). Resizing averages areas to shrink and uses Lanczos to enlarge, as kohya does.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lcp_plugin.errors import DataError

Size = tuple[int, int]  # (width, height) in pixels

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange the sides
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


def read_size(path: Path) -> Size:
    """(width, height) of the upright image, from its header only. Raises DataError."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from None
    return (height, width) if turned else (width, height)


def open_image(path: Path) -> Image.Image:
    """The upright image as RGB, transparency laid on white. Raises DataError."""
    image = _open_upright(path)
    if image.mode == "RGB":
        return image
    if _has_alpha(image):
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def open_alpha(path: Path) -> Image.Image | None:
    """The upright image's transparency as "L" (255 is opaque), None if it has none."""
    image = _open_upright(path)
    return image.convert("RGBA").getchannel("A") if _has_alpha(image) else None


def open_mask(path: Path) -> Image.Image:
    """A mask image's red channel as "L"; 255 counts fully."""
    return _open_upright(path).convert("RGB").getchannel("R")


def _open_upright(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from None
    if upright.mode.startswith("I"):  # 16 bits a channel: PIL would clip, not scale
        values = np.asarray(upright, dtype=np.float64) / 257.0
        upright = Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))
    return upright


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(f"image {path} cannot be read ({reason}); replace or remove it.")


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
