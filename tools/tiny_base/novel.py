"""Quickstart data: nine objects and seven styles that the base has never seen, drawn from nothing.

    configs/quickstart/objects/<name>/0N.png            six views of each object, 192 px
    configs/quickstart/styles/<Style>/<Object>/<n>.png  UnlearnCanvas's layout (arXiv 2402.11846)
    configs/quickstart/choosing_styles/...              two styles that no reported run learns

The objects belong to classes the base knows (robot, vase, ...) and look like none it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tiny_base.pen import SUPERSAMPLING, Colour, Pen, Point, View, arc
from tiny_base.styles import CHOOSING_STYLES, STYLE_OBJECTS, STYLES, Stylise

SIDE = 192  # pixels
VIEWS = 6
STYLE_SIDE = 96  # pixels; twice the base's own resolution
STYLE_IMAGES = 4  # of each object in each style


def render_quickstart(folder: Path, seed: int = 0) -> int:
    """Write all images below `folder`; returns how many. The same seed writes the same bytes."""
    count = 0
    for name in OBJECTS:
        for index in range(VIEWS):
            _save(draw_object(name, index, seed), folder / "objects" / name / f"{index:02d}.png")
            count += 1
    styles = {folder / "styles": STYLES, folder / "choosing_styles": CHOOSING_STYLES}
    for place, known in styles.items():
        count += sum(render_style(place / style, known[style], seed) for style in known)
    return count


def render_style(folder: Path, stylise: Stylise, seed: int) -> int:
    """The style's pictures of every object; how many."""
    for thing, draw in STYLE_OBJECTS.items():
        for index in range(STYLE_IMAGES):
            rng = np.random.default_rng([seed, index, *thing.encode(), *folder.name.encode()])
            _save(stylise(draw, rng, STYLE_SIDE), folder / thing / f"{index + 1}.png")
    return STYLE_IMAGES * len(STYLE_OBJECTS)


def draw_object(name: str, index: int, seed: int = 0, side: int = SIDE) -> Image.Image:
    """View number `index` of an object, on a wall and floor of its own."""
    rng = np.random.default_rng([seed, index, *name.encode()])
    view = View(
        yaw=(-0.28, -0.14, 0.0, 0.1, 0.2, 0.3)[index % 6],
        roll=float(rng.uniform(-7, 7)),
        scale=float(rng.uniform(0.8, 0.92)),
        shift=(float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.05, 0.03))),
        light=float(rng.uniform(0.92, 1.08)),
    )
    pen = Pen(side, view, _draw_room(side, index, view, rng))
    OBJECTS[name](pen)
    return pen.picture()


def _draw_room(side: int, index: int, view: View, rng: np.random.Generator) -> Image.Image:
    """Wall, floor and a shadow; six rooms, so that no two views of an object share one."""
    walls: tuple[Colour, ...] = (
        (236, 232, 222),
        (170, 200, 220),
        (120, 130, 140),
        (225, 190, 150),
        (150, 190, 150),
        (70, 75, 100),
    )
    big = side * SUPERSAMPLING
    wall = np.asarray(walls[index % len(walls)], np.float32) + rng.uniform(-6, 6, 3)
    floor = wall * 0.78 + np.asarray((24, 16, 6), np.float32)
    rows, columns = np.mgrid[0:big, 0:big].astype(np.float32) / big * 2 - 1
    edge = float(rng.uniform(0.25, 0.45))
    picture = np.where((rows > edge)[..., None], floor, wall * (1 - 0.06 * rows[..., None]))
    x, y = view.shift[0], view.shift[1] + view.scale * 0.98
    inside = ((columns - x) / (view.scale * 0.75)) ** 2 + ((rows - y) / 0.09) ** 2
    picture = picture * (1 - 0.4 * np.clip(1.2 - inside, 0, 1))[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _robot(pen: Pen) -> None:
    """A lime ball on three legs with one huge eye and a red antenna."""
    lime, dark, white = (150, 215, 40), (70, 110, 20), (250, 250, 250)
    for x in (-0.45, 0.0, 0.45):
        pen.stroke([(x * 0.7, 0.4), (x * 1.25, 0.93)], 0.13, (60, 60, 70))
        pen.ellipse(x * 1.25, 0.93, 0.15, 0.07, (60, 60, 70))
    pen.stroke([(0.0, -0.5), (0.1, -0.92)], 0.06, (60, 60, 70))
    pen.ellipse(0.1, -0.92, 0.11, 0.11, (230, 40, 50))
    pen.ellipse(0, 0, 0.72, 0.68, lime)
    pen.polygon(arc(0, 0, 0.72, 0.68, 20, 160), dark)
    pen.ellipse(0, -0.08, 0.42, 0.42, white, 0.7)
    pen.ellipse(0.02, -0.06, 0.25, 0.25, (30, 90, 200), 0.85)
    pen.ellipse(0.03, -0.05, 0.12, 0.12, (15, 15, 25), 1.0)
    pen.ellipse(0.1, -0.16, 0.06, 0.06, white, 1.0)


def _vase(pen: Pen) -> None:
    """A tall navy vase with orange zigzags and a white neck."""
    navy, orange, cream = (28, 38, 110), (245, 130, 30), (250, 244, 228)
    right: list[Point] = [(0.2, -0.95), (0.17, -0.6), (0.55, -0.15), (0.5, 0.35), (0.28, 0.95)]
    pen.polygon(right + [(-x, y) for x, y in reversed(right)], navy)
    neck: list[Point] = [(0.2, -0.95), (0.17, -0.6), (-0.17, -0.6), (-0.2, -0.95)]
    pen.polygon(neck, cream)
    pen.ellipse(0, -0.95, 0.2, 0.06, (60, 50, 70))
    for y, reach in ((-0.1, 0.5), (0.3, 0.46), (0.65, 0.34)):
        xs = [reach * (i / 3 - 1) for i in range(7)]
        zigzag = [(x, y + (0.09 if i % 2 else -0.09)) for i, x in enumerate(xs)]
        pen.stroke(zigzag, 0.09, orange, 0.25)


def _teapot(pen: Pen) -> None:
    """A square pink teapot with a black and white band and a gold knob."""
    pink, black, white = (240, 90, 150), (25, 25, 30), (250, 250, 250)
    pen.stroke(arc(0.62, 0.12, 0.33, 0.38, -80, 80), 0.12, black)
    pen.polygon([(-0.5, 0.45), (-0.5, 0.1), (-0.98, -0.3), (-0.82, -0.36)], pink)
    pen.box(0, 0.18, 0.6, 0.56, pink)
    pen.polygon([(-0.5, -0.38), (0.5, -0.38), (0.36, -0.58), (-0.36, -0.58)], (200, 55, 115))
    pen.ellipse(0, -0.68, 0.13, 0.13, (240, 190, 40))
    for row, y in enumerate((0.02, 0.3)):
        for column in range(4):
            colour = black if (row + column) % 2 else white
            pen.box(-0.45 + 0.3 * column, y, 0.15, 0.14, colour, 0.1)


def _monster(pen: Pen) -> None:
    """A shaggy teal monster with three eyes, a yellow belly and orange horns."""
    teal, yellow, white = (0, 150, 150), (250, 215, 70), (252, 252, 252)
    pen.polygon([(-0.5, -0.5), (-0.75, -1.0), (-0.25, -0.68)], (240, 120, 30))
    pen.polygon([(0.5, -0.5), (0.75, -1.0), (0.25, -0.68)], (240, 120, 30))
    spikes = []
    for i in range(48):
        reach = 1.0 if i % 2 else 0.86
        x, y = arc(0, 0.1, 0.82 * reach, 0.88 * reach, 7.5 * i, 7.5 * i + 1)[0]
        spikes.append((x, y))
    pen.polygon(spikes, teal)
    pen.ellipse(0, 0.48, 0.44, 0.36, yellow, 0.4)
    for x, y in ((-0.42, -0.2), (0.0, -0.42), (0.42, -0.2)):
        pen.ellipse(x, y, 0.21, 0.22, white, 0.6)
        pen.ellipse(x, y, 0.1, 0.11, (20, 20, 30), 0.75)
    pen.polygon(arc(0, 0.08, 0.36, 0.18, 0, 180), (120, 20, 50), 0.6)
    pen.polygon([(-0.1, 0.08), (0.1, 0.08), (0.0, 0.18)], white, 0.65)


def _mushroom(pen: Pen) -> None:
    """A violet mushroom with white rings on its cap and a checked stalk."""
    violet, white, beige = (105, 50, 175), (250, 248, 240), (235, 215, 170)
    pen.polygon([(-0.2, 0.0), (0.2, 0.0), (0.32, 0.95), (-0.32, 0.95)], beige)
    for row in range(4):
        for column in range(2):
            x = -0.13 + 0.26 * column
            if (row + column) % 2:
                pen.box(x, 0.18 + 0.22 * row, 0.13, 0.11, (60, 150, 90), 0.1)
    pen.polygon(arc(0, 0.08, 0.92, 0.95, 180, 360), violet)
    pen.ellipse(0, 0.08, 0.92, 0.16, (70, 30, 125))
    for x, y, r in ((-0.5, -0.25, 0.18), (0.05, -0.5, 0.24), (0.52, -0.2, 0.16)):
        pen.ellipse(x, y, r, r, white, 0.4)
        pen.ellipse(x, y, r * 0.55, r * 0.55, violet, 0.4)


def _boat(pen: Pen) -> None:
    """A green boat with two sails, one red with a yellow sun, one black and white."""
    pen.stroke([(0.0, 0.4), (0.0, -0.98)], 0.06, (110, 70, 40))
    pen.polygon([(-0.95, 0.4), (0.95, 0.4), (0.6, 0.92), (-0.6, 0.92)], (20, 130, 80))
    pen.box(0, 0.47, 0.9, 0.07, (250, 245, 230))
    pen.polygon([(-0.06, -0.9), (-0.06, 0.3), (-0.85, 0.3)], (215, 40, 40))
    pen.ellipse(-0.3, 0.0, 0.16, 0.16, (252, 215, 60), 0.2)
    pen.polygon([(0.06, -0.7), (0.06, 0.3), (0.75, 0.3)], (250, 250, 250))
    for y in (-0.35, -0.05, 0.22):
        reach = 0.06 + 0.69 * (y + 0.7)
        pen.polygon(
            [(0.06, y - 0.06), (reach - 0.04, y - 0.06), (reach, y + 0.06), (0.06, y + 0.06)],
            (25, 25, 30),
        )


def _cup(pen: Pen) -> None:
    """A sky-blue cup with red dots, a yellow rim and a thick black handle."""
    blue, red, yellow, black = (70, 165, 235), (215, 35, 45), (250, 210, 60), (25, 25, 30)
    pen.stroke(arc(0.6, 0.1, 0.32, 0.36, -85, 85), 0.15, black)
    pen.polygon([(-0.68, -0.7), (0.68, -0.7), (0.5, 0.9), (-0.5, 0.9)], blue)
    pen.box(0, -0.72, 0.72, 0.1, yellow, 0.1)
    dots = ((-0.36, -0.3), (0.1, -0.3), (-0.14, 0.12), (0.34, 0.12), (-0.3, 0.55), (0.14, 0.55))
    for x, y in dots:
        pen.ellipse(x, y, 0.14, 0.14, red, 0.4)


def _rocket(pen: Pen) -> None:
    """A yellow rocket with black chevrons, a round green window and two purple fins."""
    yellow, black, green, purple = (248, 205, 45), (30, 28, 35), (60, 190, 120), (130, 60, 180)
    for side in (-1, 1):
        pen.polygon([(side * 0.3, 0.25), (side * 0.8, 0.8), (side * 0.3, 0.75)], purple)
    pen.polygon([(-0.2, 0.75), (0.2, 0.75), (0.0, 1.0)], (240, 110, 30))
    right: list[Point] = [(0.0, -1.0), (0.25, -0.65), (0.38, -0.1), (0.36, 0.78)]
    pen.polygon(right + [(-x, y) for x, y in reversed(right)], yellow)
    for y in (0.15, 0.42, 0.69):
        pen.stroke([(-0.34, y + 0.06), (0.0, y - 0.1), (0.34, y + 0.06)], 0.1, black, 0.25)
    pen.ellipse(0, -0.32, 0.24, 0.24, (250, 250, 250), 0.4)
    pen.ellipse(0, -0.32, 0.16, 0.16, green, 0.5)


def _house(pen: Pen) -> None:
    """A white house with a striped blue roof, a red round door and one orange window."""
    white, blue, red, orange = (248, 246, 240), (35, 80, 190), (205, 40, 50), (245, 150, 40)
    pen.box(0.5, -0.6, 0.12, 0.26, (90, 60, 50))
    pen.box(0, 0.4, 0.72, 0.52, white)
    pen.polygon([(-0.95, -0.1), (0.95, -0.1), (0.0, -0.92)], blue)
    for y, reach in ((-0.28, 0.7), (-0.52, 0.42)):
        pen.box(0, y, reach, 0.04, (120, 170, 240), 0.1)
    top = arc(-0.2, 0.45, 0.25, 0.3, 180, 360)
    pen.polygon([(-0.45, 0.92), (-0.45, 0.45), *top, (0.05, 0.92)], red, 0.1)
    pen.box(0.4, 0.3, 0.2, 0.2, orange, 0.1)
    pen.box(0.4, 0.3, 0.2, 0.025, white, 0.1)
    pen.box(0.4, 0.3, 0.025, 0.2, white, 0.1)


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "robot": _robot,
    "vase": _vase,
    "teapot": _teapot,
    "monster": _monster,
    "mushroom": _mushroom,
    "boat": _boat,
    "cup": _cup,  # these three, and the monster, are for choosing settings: configs/choosing.toml
    "rocket": _rocket,
    "house": _house,
}


def _save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(file, optimize=True)
