"""Procedural backgrounds of the world: twelve scenes as (side, side, 3) pictures, values 0 to 255.

Each is drawn from a generator alone: noise, gradients and a few polygons, no photograph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.float32]  # (side, side, 3), 0 to 255
SIDE = 112  # drawn with a margin, then cropped to 96 at a random place
VARIANTS = 48


@lru_cache(maxsize=1024)
def scene_variant(name: str, variant: int) -> Picture:
    """Variant number `variant` of a scene; the same for ever."""
    rng = np.random.default_rng([variant, *name.encode()])
    return np.clip(_SCENES[name](rng), 0, 255).astype(np.float32)


def smooth_noise(rng: np.random.Generator, cells: tuple[int, int], side: int = SIDE) -> Picture:
    """Bicubically enlarged noise of (rows, columns) cells: (side, side, 1), roughly -1 to 1."""
    small = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32))
    large = small.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float32)[..., None]


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Picture:
    t = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    column = np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t
    return np.broadcast_to(column, (SIDE, SIDE, 3)).copy()


def _ground(sky: Picture, ground: Picture, horizon: float, wobble: Picture) -> Picture:
    """`ground` below the horizon (a share of the height), whose line follows `wobble` (pixels)."""
    rows = np.arange(SIDE, dtype=np.float32)[:, None, None]
    line = horizon * SIDE + wobble[SIDE // 2][None, :, :]
    return np.where(rows > line, ground, sky)


def _sky(rng: np.random.Generator) -> Picture:
    shift = int(rng.integers(-15, 15))
    return _gradient((105 + shift, 180 + shift, 240), (190 + shift, 225, 250))


def _grass(rng: np.random.Generator) -> Picture:
    ground = _gradient((95, 180, 60), (60, 145, 45)) + 22 * smooth_noise(rng, (14, 56))
    return _ground(_sky(rng), ground, rng.uniform(0.25, 0.42), 4 * smooth_noise(rng, (3, 3)))


def _snow(rng: np.random.Generator) -> Picture:
    sky = _gradient((165, 185, 210), (205, 218, 232))
    ground = _gradient((240, 245, 252), (225, 235, 248)) + 6 * smooth_noise(rng, (6, 6))
    picture = _ground(sky, ground, rng.uniform(0.45, 0.6), 5 * smooth_noise(rng, (3, 4)))
    return _dots(rng, picture, count=60, radius=(1.0, 2.4), colour=(255, 255, 255))


def _beach(rng: np.random.Generator) -> Picture:
    sea = _gradient((60, 150, 210), (70, 175, 215)) + 8 * smooth_noise(rng, (24, 6))
    sand = _gradient((240, 215, 160), (228, 195, 130)) + 8 * smooth_noise(rng, (40, 40))
    horizon = rng.uniform(0.2, 0.32)
    picture = _ground(_sky(rng), sea, horizon, np.zeros((SIDE, SIDE, 1), np.float32))
    return _ground(picture, sand, horizon + 0.24, 5 * smooth_noise(rng, (3, 4)))


def _night(rng: np.random.Generator) -> Picture:
    picture = _gradient((8, 10, 38), (28, 30, 80)) + 3 * smooth_noise(rng, (4, 4))
    picture = _dots(rng, picture, count=45, radius=(0.8, 1.8), colour=(245, 240, 200))
    x, y = rng.uniform(15, SIDE - 15), rng.uniform(12, 30)
    return _dots(rng, picture, 1, (8.0, 10.0), (245, 238, 190), at=(x, y))


def _brick(rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (SIDE, SIDE), (205, 195, 185))
    draw = ImageDraw.Draw(image)
    for row, top in enumerate(range(-int(rng.integers(14)), SIDE, 14)):
        for left in range(-28 + 14 * (row % 2), SIDE, 28):
            shade = int(rng.integers(-18, 18))
            colour = (170 + shade, 75 + shade // 2, 58 + shade // 2)
            draw.rectangle((left, top, left + 25, top + 11), fill=colour)
    return np.asarray(image, np.float32) + 4 * smooth_noise(rng, (50, 50))


def _wood(rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (SIDE, SIDE), (95, 60, 32))
    draw = ImageDraw.Draw(image)
    for top in range(-int(rng.integers(18)), SIDE, 18):
        shade = int(rng.integers(-20, 20))
        fill = (182 + shade, 128 + shade, 76 + shade)
        draw.rectangle((0, top, SIDE, top + 16), fill=fill)
    return np.asarray(image, np.float32) + 12 * smooth_noise(rng, (56, 5))


def _water(rng: np.random.Generator) -> Picture:
    waves = smooth_noise(rng, (28, 7))
    crests: Picture = np.maximum(waves, -0.2)
    return _gradient((50, 140, 205), (20, 85, 165)) + 30 * crests


def _city(rng: np.random.Generator) -> Picture:
    image = Image.fromarray(_sky(rng).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    left = -int(rng.integers(8))
    while left < SIDE:
        width, top = int(rng.integers(16, 30)), int(rng.integers(12, 60))
        shade = int(rng.integers(70, 130))
        draw.rectangle((left, top, left + width, SIDE), fill=(shade, shade + 4, shade + 16))
        for y in range(top + 5, SIDE, 10):
            for x in range(left + 4, left + width - 4, 8):
                draw.rectangle((x, y, x + 3, y + 4), fill=(250, 225, 140))
        left += width + 2
    return np.asarray(image, np.float32)


def _mountain(rng: np.random.Generator) -> Picture:
    image = Image.fromarray(_sky(rng).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for centre in rng.permutation([12, 50, 92]):
        x, top = centre + int(rng.integers(-9, 9)), int(rng.integers(8, 34))
        shade = int(rng.integers(-15, 15))
        draw.polygon(
            [(x - 58, SIDE), (x, top), (x + 58, SIDE)], fill=(105 + shade, 100 + shade, 125)
        )
        draw.polygon([(x - 15, top + 24), (x, top), (x + 15, top + 24)], fill=(245, 247, 252))
    draw.rectangle((0, SIDE - 20, SIDE, SIDE), fill=(85, 135, 75))
    return np.asarray(image, np.float32)


def _jungle(rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (SIDE, SIDE), (14, 52, 26))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x = int(rng.integers(SIDE))
        draw.rectangle((x, 0, x + 8, SIDE), fill=(75, 52, 30))
    for _ in range(90):
        x, y = rng.uniform(-5, SIDE, 2)
        w, h = rng.uniform(6, 20), rng.uniform(4, 10)
        shade = int(rng.integers(-25, 35))
        draw.ellipse((x, y, x + w, y + h), fill=(24 + shade // 3, 95 + shade, 38 + shade // 3))
    return np.asarray(image, np.float32)


def _street(rng: np.random.Generator) -> Picture:
    image = Image.new("RGB", (SIDE, SIDE), (72, 70, 70))
    draw = ImageDraw.Draw(image)
    for row, top in enumerate(range(-int(rng.integers(14)), SIDE, 14)):
        for left in range(-16 + 8 * (row % 2), SIDE, 16):
            shade = int(rng.integers(-22, 22))
            colour = (148 + shade, 144 + shade, 140 + shade)
            draw.rounded_rectangle((left, top, left + 13, top + 11), radius=5, fill=colour)
    return np.asarray(image, np.float32)


def _desert(rng: np.random.Generator) -> Picture:
    sky = _gradient((250, 185, 110), (255, 225, 165))
    far = _gradient((225, 160, 90), (215, 145, 75)) + 4 * smooth_noise(rng, (10, 4))
    near = _gradient((205, 130, 62), (190, 112, 50)) + 4 * smooth_noise(rng, (10, 4))
    horizon = rng.uniform(0.35, 0.5)
    picture = _ground(sky, far, horizon, 12 * smooth_noise(rng, (2, 3)))
    return _ground(picture, near, horizon + 0.25, 12 * smooth_noise(rng, (2, 3)))


def _dots(
    rng: np.random.Generator,
    picture: Picture,
    count: int,
    radius: tuple[float, float],
    colour: tuple[int, int, int],
    at: tuple[float, float] | None = None,
) -> Picture:
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = at if at is not None else rng.uniform(0, SIDE, 2)
        r = rng.uniform(*radius)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return np.asarray(image, np.float32)


_SCENES: dict[str, Callable[[np.random.Generator], Picture]] = {
    "grass": _grass,
    "snow": _snow,
    "beach": _beach,
    "night": _night,
    "brick": _brick,
    "wood": _wood,
    "water": _water,
    "city": _city,
    "mountain": _mountain,
    "jungle": _jungle,
    "street": _street,
    "desert": _desert,
}
