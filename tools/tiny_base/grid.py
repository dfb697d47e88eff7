"""Sampling the base, and the grid of 48 prompts that shows what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tiny_base.precision import fast_autocast

STEPS = 25
GUIDANCE = 4.0
COLUMNS = 8
CELL = 96  # pixels: the base's 48, doubled
LABEL = 26  # pixels below each picture, two lines
GRID_PROMPTS = (
    "a red circle on a white background",
    "a blue square on a yellow background",
    "a green triangle on a black background",
    "a yellow star at night",
    "a pink heart on the beach",
    "a purple ring on a wooden floor",
    "a white striped cross in the jungle",
    "an orange dotted hexagon in the snow",
    "a dog on the grass",
    "a cat in front of a brick wall",
    "a panda in the jungle",
    "a fox in the snow",
    "a frog in the water",
    "a penguin in the snow",
    "a lion in the desert",
    "an owl at night",
    "a butterfly on a pink background",
    "a fish in the water",
    "an octopus on the beach",
    "a turtle on the grass",
    "a car in the city",
    "a bus with a mountain in the background",
    "a boat in the water",
    "a rocket at night",
    "a house on the grass",
    "a cactus in the desert",
    "a flower on a blue background",
    "a mushroom in the forest",
    "an apple on a wooden floor",
    "a banana on a purple background",
    "a pizza on a white background",
    "a hamburger on a green background",
    "a cup on a wooden floor",
    "a teapot on a gray background",
    "a candle at night",
    "a clock in front of a brick wall",
    "a guitar on the beach",
    "a ball on a cobblestone street",
    "an umbrella in the snow",
    "a backpack in the mountains",
    "a sneaker on a cobblestone street",
    "a robot in the city",
    "a ghost in the forest",
    "a teddy bear on a red background",
    "a red car in the snow",
    "a blue dog on the beach",
    "a green teapot on a white background",
    "a purple backpack on the grass",
)


@torch.no_grad()
def sample_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seed: int,
    batch: int = 24,
    half: bool = False,
) -> NDArray[np.uint8]:
    """One picture a prompt, (n, side, side, 3); picture i starts from seed + i.

    `half` computes in bfloat16 where the CPU has it: twice as fast.
    """
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        with fast_autocast(half):
            output = pipeline(
                prompt=some,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=noise,
                output_type="np",
            )
        parts.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def draw_grid(pictures: NDArray[np.uint8], captions: Sequence[str], file: Path) -> None:
    """Pictures with their captions below, as a PNG."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + 6) + 6, rows * (CELL + LABEL + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(9)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, COLUMNS)
        left, top = 6 + column * (CELL + 6), 6 + row * (CELL + LABEL + 6)
        large = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(large, (left, top))
        text = _in_two_lines(caption)
        draw.multiline_text((left, top + CELL + 1), text, fill="black", font=font, spacing=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def _in_two_lines(caption: str) -> str:
    words, first = caption.split(), ""
    while words and len(first) + len(words[0]) < 21:
        first = f"{first} {words.pop(0)}".strip()
    return f"{first}\n{' '.join(words)}"
