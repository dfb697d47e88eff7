"""Styles that the base has never seen, and the simple objects they are shown on.

Each style redraws an object from its flat picture and outline: Blueprint (white lines on a blue
grid), Neon (glowing lines on black), Stained_Glass (leaded cells), Risograph (two inks on cream)
and Pop_Art (four bright panels under thick lines). Settings are chosen on two others: Thermal (the
colours of a heat camera) and Sunset (dark shapes before a banded sky).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tiny_base.pen import Pen, View, arc

Flat = NDArray[np.float32]  # (side, side, 3), 0 to 255
Draw = Callable[[Pen], None]
KEY = (255, 0, 255)  # marks where nothing was drawn


def _house(pen: Pen) -> None:
    pen.box(0, 0.35, 0.65, 0.5, (225, 190, 140))
    pen.polygon([(-0.85, -0.12), (0.0, -0.85), (0.85, -0.12)], (190, 70, 60))
    pen.box(0.0, 0.55, 0.16, 0.3, (110, 70, 45))
    for x in (-0.4, 0.4):
        pen.box(x, 0.2, 0.14, 0.14, (130, 190, 230))


def _tree(pen: Pen) -> None:
    pen.box(0, 0.6, 0.13, 0.35, (120, 80, 50))
    for x, y, r in ((-0.35, 0.05, 0.42), (0.35, 0.05, 0.42), (0.0, -0.4, 0.5)):
        pen.ellipse(x, y, r, r, (70, 150, 70))


def _flower(pen: Pen) -> None:
    pen.stroke([(0.0, 0.0), (0.05, 0.95)], 0.1, (70, 150, 70))
    for turn in range(6):
        x, y = arc(0, -0.25, 0.4, 0.4, 60 * turn, 60 * turn + 1)[0]
        pen.ellipse(x, y, 0.26, 0.26, (235, 110, 160))
    pen.ellipse(0, -0.25, 0.24, 0.24, (245, 205, 70))


def _fish(pen: Pen) -> None:
    pen.polygon([(0.45, 0.0), (0.95, -0.45), (0.95, 0.45)], (230, 120, 50))
    pen.ellipse(-0.1, 0, 0.72, 0.46, (245, 160, 60))
    pen.box(-0.05, 0, 0.09, 0.42, (250, 240, 230))
    pen.ellipse(-0.5, -0.1, 0.09, 0.09, (30, 30, 40))


def _star(pen: Pen) -> None:
    points = []
    for i in range(10):
        reach = 0.42 if i % 2 else 0.98
        points.append(arc(0, 0, reach, reach, 36 * i - 90, 36 * i - 89)[0])
    pen.polygon(points, (245, 200, 60))


def _cup(pen: Pen) -> None:
    pen.stroke(arc(0.5, 0.05, 0.32, 0.32, -90, 90), 0.13, (90, 130, 200))
    pen.polygon([(-0.6, -0.45), (0.6, -0.45), (0.45, 0.7), (-0.45, 0.7)], (90, 130, 200))
    pen.ellipse(0, -0.45, 0.6, 0.16, (110, 70, 45))


STYLE_OBJECTS: dict[str, Draw] = {
    "House": _house,
    "Tree": _tree,
    "Flower": _flower,
    "Fish": _fish,
    "Star": _star,
    "Cup": _cup,
}


def _flat_picture(draw: Draw, rng: np.random.Generator, side: int) -> tuple[Flat, Flat]:
    """The object in flat colours, and its coverage (side, side, 1)."""
    view = View(
        roll=float(rng.uniform(-9, 9)),
        scale=float(rng.uniform(0.62, 0.8)),
        shift=(float(rng.uniform(-0.12, 0.12)), float(rng.uniform(-0.1, 0.1))),
    )
    pen = Pen(side, view, Image.new("RGB", (4 * side, 4 * side), KEY))
    draw(pen)
    flat = np.asarray(pen.picture(), np.float32)
    distance = np.abs(flat - np.asarray(KEY, np.float32)).sum(-1, keepdims=True)
    return flat, np.clip(distance / 200, 0, 1).astype(np.float32)


def _outline(flat: Flat, width: int) -> Flat:
    """Where neighbouring colours differ: (side, side, 1), 0 to 1, about `width` pixels wide."""
    image = Image.fromarray(flat.astype(np.uint8))
    dark = np.asarray(image.filter(ImageFilter.MinFilter(width)), np.float32)
    bright = np.asarray(image.filter(ImageFilter.MaxFilter(width)), np.float32)
    line: Flat = np.clip((bright - dark).max(-1, keepdims=True) / 60 - 0.4, 0, 1)
    return line


def _blueprint(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, _ = _flat_picture(draw, rng, side)
    y, x = np.mgrid[0:side, 0:side]
    step = side // 8
    grid = ((x % step == 0) | (y % step == 0)).astype(np.float32)[..., None]
    paper = np.asarray((22, 62, 150), np.float32) + 38 * grid
    return _to_image(paper + (np.asarray((240, 246, 255)) - paper) * _outline(flat, 3))


def _neon(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, _ = _flat_picture(draw, rng, side)
    line = _outline(flat, 3)
    as_image = Image.fromarray((line[..., 0] * 255).astype(np.uint8))
    glow = np.asarray(as_image.filter(ImageFilter.GaussianBlur(side / 20)), np.float32) / 255
    across = np.linspace(0, 1, side, dtype=np.float32)[None, :, None]
    ink = np.asarray((255, 40, 200)) * (1 - across) + np.asarray((40, 230, 255)) * across
    night = np.asarray((12, 4, 24), np.float32)
    return _to_image(night + ink * (1.5 * glow[..., None]) + ink * line)


def _stained_glass(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, cover = _flat_picture(draw, rng, side)
    seeds = rng.uniform(0, side, (46, 2))
    y, x = np.mgrid[0:side, 0:side]
    squared = (x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2
    cell = squared.argmin(-1)
    shades = rng.uniform(0.75, 1.2, (46, 1))[cell]
    around = np.asarray(((200, 40, 60), (40, 70, 190), (30, 140, 90), (240, 180, 40)))
    glass = around[rng.integers(4, size=46)][cell] * 0.9
    picture = (flat * cover + glass * (1 - cover)) * shades
    cells = np.repeat((cell * 37 % 255)[..., None], 3, -1).astype(np.float32)
    lead = np.maximum(_outline(cells, 3) * (1 - cover * 0.6), _outline(flat * cover, 5))
    return _to_image(picture * (1 - lead) + 18 * lead)


def _risograph(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, cover = _flat_picture(draw, rng, side)
    light = flat.mean(-1, keepdims=True) / 255
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    period = side / 16
    screen = (np.cos(2 * np.pi * x / period) * np.cos(2 * np.pi * y / period) + 1)[..., None] / 2
    cream = np.asarray((248, 240, 222), np.float32)
    pink, teal = np.asarray((255, 92, 120)), np.asarray((0, 128, 138))
    first = cover * (light + 0.15 > 0.35)
    second = np.roll(cover, (2, 2), (0, 1)) * (1.15 - 1.1 * light > screen)
    picture = cream * (1 - first) + cream * pink / 255 * first
    picture = picture * (1 - second) + picture * teal / 255 * second
    return _to_image(picture + rng.normal(0, 3, (side, side, 1)))


def _pop_art(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, cover = _flat_picture(draw, rng, side)
    y, x = np.mgrid[0:side, 0:side]
    middle = side / 2 + rng.uniform(-side / 12, side / 12, 2)
    panel = 2 * (y > middle[0]) + (x > middle[1])
    papers = ((255, 214, 10), (250, 60, 140), (40, 190, 235), (150, 220, 50))
    inks = ((240, 50, 40), (250, 235, 60), (250, 120, 20), (90, 50, 200))
    paper, ink = (np.asarray(colours, np.float32)[panel] for colours in (papers, inks))
    shade = 0.55 + 0.5 * flat.mean(-1, keepdims=True) / 255
    picture = paper * (1 - cover) + np.minimum(ink * shade, 255) * cover
    line = _outline(flat * cover, 5)
    return _to_image(picture * (1 - line) + 12 * line)


def _thermal(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, cover = _flat_picture(draw, rng, side)
    inside = Image.fromarray((cover[..., 0] * (1.1 - flat.mean(-1) / 400) * 230).astype(np.uint8))
    blurred = np.asarray(inside.filter(ImageFilter.GaussianBlur(side / 26)), np.float32) / 255
    y = np.linspace(0, 1, side, dtype=np.float32)[:, None]
    heat = np.clip(0.14 + 0.1 * y + 1.05 * blurred, 0, 1)
    stops = np.linspace(0, 1, 6)
    shades = ((10, 8, 60), (80, 10, 150), (215, 30, 120), (250, 110, 20), (255, 210, 40))
    ramp = np.asarray((*shades, (255, 255, 220)), np.float32)
    return _to_image(np.stack([np.interp(heat, stops, ramp[:, i]) for i in range(3)], -1))


def _sunset(draw: Draw, rng: np.random.Generator, side: int) -> Image.Image:
    flat, cover = _flat_picture(draw, rng, side)
    y, x = np.mgrid[0:side, 0:side] / side
    centre = np.asarray((0.5, 0.6)) + rng.uniform(-0.1, 0.1, 2)
    band = np.hypot(x - centre[0], y - centre[1]) * 6
    bands = ((255, 240, 170), (255, 190, 70), (250, 120, 50), (215, 60, 90), (130, 40, 120))
    sky = np.asarray((*bands, (60, 25, 95)), np.float32)[np.clip(band, 0, 5).astype(int)]
    return _to_image(sky * (1 - cover) + (np.asarray((20, 8, 30)) + 0.16 * flat) * cover)


def _to_image(picture: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


Stylise = Callable[[Draw, np.random.Generator, int], Image.Image]
STYLES: dict[str, Stylise] = {
    "Blueprint": _blueprint,
    "Neon": _neon,
    "Stained_Glass": _stained_glass,
    "Risograph": _risograph,
    "Pop_Art": _pop_art,
}
CHOOSING_STYLES: dict[str, Stylise] = {"Thermal": _thermal, "Sunset": _sunset}
