"""Pictures for the autoencoder: the world's scenes, every emoji of both sets, and dead leaves.

Dead leaves (occluding discs and polygons whose sizes follow a power law) have about the edge
statistics of photographs; so do sums of noise over octaves. No photograph is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tiny_base.render import (
    CANVAS,
    Sprites,
    average_down,
    draw_background,
    draw_scene,
    place_sprite,
    tint,
)
from tiny_base.scenery import Picture, smooth_noise
from tiny_base.world import BACKGROUNDS, COLOURS, SETS, sample_scene


def draw_wide(rng: np.random.Generator, sprites: Sprites, side: int) -> NDArray[np.uint8]:
    """One picture (side, side, 3): 45% world, 30% any emoji, 25% dead leaves and noise."""
    kind = rng.random()
    if kind < 0.45:
        return draw_scene(sample_scene(rng), sprites, side)
    return average_down(_draw_any_emoji(rng, sprites) if kind < 0.75 else _draw_leaves(rng), side)


def draw_pool(
    draw: Callable[[np.random.Generator], NDArray[np.uint8]], seed: int, count: int
) -> NDArray[np.uint8]:
    """`count` pictures, each from a generator of its own: (count, side, side, 3)."""
    return np.stack([draw(np.random.default_rng([seed, index])) for index in range(count)])


def _draw_any_emoji(rng: np.random.Generator, sprites: Sprites) -> Picture:
    name = SETS[int(rng.integers(len(SETS)))]
    codes = sprites.all_codes(name)
    sprite = sprites.load(name, codes[int(rng.integers(len(codes)))])
    background = draw_background(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], rng)
    centre = (float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.3, 0.7)))
    size, angle = float(rng.uniform(0.4, 1.3)), float(rng.uniform(-40, 40))
    subject, mask = place_sprite(sprite, size, centre, angle, flip=bool(rng.random() < 0.5))
    if rng.random() < 0.25:
        subject = tint(subject, tuple(COLOURS.values())[int(rng.integers(len(COLOURS)))])
    return background * (1 - mask) + subject * mask


def _draw_leaves(rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (CANVAS, CANVAS), _random_colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(5, 90))):
        radius = min(60.0, 3.0 * rng.random() ** -0.7)
        x, y = rng.uniform(0, CANVAS, 2)
        if rng.random() < 0.5:
            stretch = rng.uniform(0.4, 1.0)
            box = (x - radius, y - stretch * radius, x + radius, y + stretch * radius)
            draw.ellipse(box, fill=_random_colour(rng))
        else:
            turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 6))))
            corners = [(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns]
            draw.polygon(corners, fill=_random_colour(rng))
    picture = np.asarray(image, np.float32)
    strength = rng.uniform(0, 30)
    for cells in (3, 6, 12, 24, 48):
        colour = rng.normal(1, 0.3, (1, 1, 3)).astype(np.float32)
        picture = picture + strength / 2 * smooth_noise(rng, (cells, cells), CANVAS) * colour
    return picture


def _random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    grey = rng.uniform(20, 235)
    red, green, blue = np.clip(grey + rng.normal(0, 55, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)
