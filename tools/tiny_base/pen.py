"""Drawing by polygons in an object's own coordinates: turned, shifted, seen from a little aside.

x and y run from about -1 to 1, y downwards; `depth` (0: the silhouette, 1: the foremost point) lets
a detail move across the object when the view's yaw changes, which makes views differ as of a solid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
SUPERSAMPLING = 4


@dataclass(frozen=True)
class View:
    """How an object is seen."""

    yaw: float = 0.0  # share of the radius that the foremost point moves sideways
    roll: float = 0.0  # degrees
    scale: float = 0.72  # radius as a share of half the picture
    shift: Point = (0.0, 0.0)  # share of half the picture
    light: float = 1.0  # factor on all colours of the object


class Pen:
    """Draws on a supersampled canvas of `side` pixels."""

    def __init__(self, side: int, view: View, background: Image.Image | None = None) -> None:
        big = side * SUPERSAMPLING
        self._side, self._big, self._view = side, big, view
        self._image = Image.new("RGB", (big, big)) if background is None else background.copy()
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Iterable[Point], colour: Colour, depth: float = 0.0) -> None:
        """A filled polygon."""
        light = self._view.light
        fill = tuple(min(255, round(channel * light)) for channel in colour)
        self._draw.polygon([self._place(x, y, depth) for x, y in points], fill=fill)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, depth: float = 0.0
    ) -> None:
        """A filled ellipse about (x, y)."""
        self.polygon(arc(x, y, rx, ry, 0, 360), colour, depth)

    def box(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, depth: float = 0.0
    ) -> None:
        """A filled rectangle about (x, y)."""
        corners = [(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)]
        self.polygon(corners, colour, depth)

    def stroke(self, points: list[Point], width: float, colour: Colour, depth: float = 0.0) -> None:
        """A line of some width with round joints."""
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            u, v = (y1 - y0) / length * width / 2, (x0 - x1) / length * width / 2
            corners = [(x0 + u, y0 + v), (x1 + u, y1 + v), (x1 - u, y1 - v), (x0 - u, y0 - v)]
            self.polygon(corners, colour, depth)
        for x, y in points:
            self.ellipse(x, y, width / 2, width / 2, colour, depth)

    def picture(self) -> Image.Image:
        """What was drawn, `side` pixels wide."""
        return self._image.resize((self._side, self._side), Image.Resampling.BOX)

    def _place(self, x: float, y: float, depth: float) -> Point:
        view, half = self._view, self._big / 2
        x = x * (1 - 0.35 * abs(view.yaw)) + view.yaw * depth
        turn = math.radians(view.roll)
        across = x * math.cos(turn) - y * math.sin(turn)
        down = x * math.sin(turn) + y * math.cos(turn)
        return (
            half * (1 + view.shift[0] + view.scale * across),
            half * (1 + view.shift[1] + view.scale * down),
        )


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Points of an ellipse's arc, degrees clockwise from the right."""
    count = max(8, round(abs(end - start) / 6))
    turns = [math.radians(start + (end - start) * i / count) for i in range(count + 1)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]
