"""Images as encoders want them: RGB, resized and cropped as the published scores did it.

No torchvision: PIL resizes, which is what its transforms and the PIL processors of transformers do
underneath. `crop` names the two ways of placing an odd centre crop: torchvision rounds half to
even, transformers rounds down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.errors import ScoringError
from lcp_plugin.formats import pictures
from lcp_plugin.formats.pictures import to_rgb

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` (bicubic), centre crop, [0, 1], then (x - mean) / std."""

    resize: int  # pixels, shorter side
    size: int  # pixels, side of the crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: Literal["torchvision", "transformers"] = "torchvision"


def require_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; DataError where there are none."""
    if not folder.is_dir():
        raise ScoringError(f"{folder} is not a folder of images.")
    found = pictures.list_images(folder)
    if not found:
        raise ScoringError(
            f"{folder} holds no images. {pictures.describe_left_out(folder)}".strip()
        )
    return found


def preprocess(image: Image.Image, how: Preprocessing) -> Tensor:
    """One image as an encoder's input   # (3, size, size), fp32."""
    resized = _resize_shorter_side(to_rgb(image), how.resize)
    cropped = _crop_centre(resized, how)
    values = np.asarray(cropped, dtype=np.float32) / np.float32(255)
    mean, std = (np.asarray(x, dtype=np.float32) for x in (how.mean, how.std))
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1).copy())


def stack_images(images: Sequence[Image.Image], how: Preprocessing) -> Tensor:
    """A batch   # (n, 3, size, size), fp32."""
    return torch.stack([preprocess(image, how) for image in images])


def hash_image(image: Image.Image) -> str:
    """sha256 of size and RGB pixels: equal for equal pictures, whatever file they lie in."""
    rgb = to_rgb(image)
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def _resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    if min(width, height) == side:
        return image
    if width <= height:
        wanted = (side, int(side * height / width))
    else:
        wanted = (int(side * width / height), side)
    return image.resize(wanted, Image.Resampling.BICUBIC)


def _crop_centre(image: Image.Image, how: Preprocessing) -> Image.Image:
    margins = (image.width - how.size, image.height - how.size)
    if how.crop == "torchvision":
        left, top = (round(margin / 2) for margin in margins)
    else:
        left, top = (margin // 2 for margin in margins)
    return image.crop((left, top, left + how.size, top + how.size))
