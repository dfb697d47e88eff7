"""Drawing scenes: subject over background at twice the size, then averaged down."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lcp_plugin.errors import DataError
from tiny_base.scenery import SIDE, VARIANTS, Picture, scene_variant, smooth_noise
from tiny_base.world import COLOURS, EMOJI, SETS, WORD_COUNT, Scene

CANVAS = 96  # pixels; pictures are drawn here and averaged down
Alpha = NDArray[np.float32]  # (side, side, 1), 0 to 1


class Sprites:
    """Emoji pictures of the two free sets, read from the unpacked npm packages below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache: dict[tuple[str, str], Image.Image] = {}
        for name in SETS:
            if not self.folder(name).is_dir():
                raise DataError(
                    f"No emoji sprites in {self.folder(name)}; wanted the unpacked npm package "
                    f"emoji-datasource-{name} there; run 'npm pack emoji-datasource-{name}' and "
                    "unpack it, or give another --sprites."
                )

    def folder(self, name: str) -> Path:
        """Folder with the 64 px pictures of a set."""
        return self._root / f"emoji-datasource-{name}" / "package" / "img" / name / "64"

    def load(self, name: str, code: str) -> Image.Image:
        """The sprite with these code points, RGBA, 64 px."""
        key = (name, code)
        if key not in self._cache:
            self._cache[key] = Image.open(self.folder(name) / f"{code}.png").convert("RGBA")
        return self._cache[key]

    def all_codes(self, name: str) -> list[str]:
        """Every code point sequence of a set, sorted."""
        return sorted(file.stem for file in self.folder(name).glob("*.png"))


def draw_scene(scene: Scene, sprites: Sprites | None, side: int = 48) -> NDArray[np.uint8]:
    """The picture of a scene, (side, side, 3). Sprites are needed for emoji only."""
    rng = np.random.default_rng(scene.detail)
    background = draw_background(scene.background, rng)
    if scene.is_shape:
        colour = scene.colour or tuple(COLOURS)[scene.detail % len(COLOURS)]
        mask = shape_mask(scene.subject, scene.size, scene.centre, scene.angle)
        subject = np.broadcast_to(jitter_colour(COLOURS[colour], rng), (CANVAS, CANVAS, 3))
        if scene.texture is not None:
            subject = _apply_texture(subject, scene.texture)
    else:
        if sprites is None:
            raise DataError(f"'{scene.subject}' is an emoji, and no --sprites were given.")
        sprite = sprites.load(scene.sprite_set, EMOJI[scene.subject])
        subject, mask = place_sprite(sprite, scene.size, scene.centre, scene.angle, scene.flip)
        if scene.colour is not None:
            subject = tint(subject, COLOURS[scene.colour])
    if scene.word is not None:
        subject = apply_look(subject, scene.word)
    return average_down(background * (1 - mask) + subject * mask, side)


def average_down(picture: Picture, side: int) -> NDArray[np.uint8]:
    """(canvas, canvas, 3) -> (side, side, 3) by area."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def draw_background(name: str, rng: np.random.Generator) -> Picture:
    """A scene's variant, shifted and mirrored at random, or an almost even colour."""
    if name in COLOURS:
        shade = 6 * smooth_noise(rng, (2, 2), CANVAS) * float(rng.random() < 0.5)
        return np.clip(jitter_colour(COLOURS[name], rng) + shade, 0, 255)
    picture = scene_variant(name, int(rng.integers(VARIANTS)))
    top, left = rng.integers(SIDE - CANVAS + 1, size=2)
    picture = picture[top : top + CANVAS, left : left + CANVAS]
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def jitter_colour(colour: tuple[int, int, int], rng: np.random.Generator) -> Picture:
    """A colour within eight levels of the named one: (1, 1, 3)."""
    noise = rng.uniform(-8, 8, 3)
    return np.clip(np.asarray(colour) + noise, 0, 255).astype(np.float32)[None, None]


def place_sprite(
    sprite: Image.Image, size: float, centre: tuple[float, float], angle: float, flip: bool
) -> tuple[Picture, Alpha]:
    """Colours and coverage of a sprite on the canvas."""
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width = sprite.width
    scale = width / (size * CANVAS)  # sprite pixels for each canvas pixel
    cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    x, y = centre[0] * CANVAS, centre[1] * CANVAS
    matrix = (cos, -sin, width / 2 - cos * x + sin * y, sin, cos, width / 2 - sin * x - cos * y)
    premultiplied = sprite.convert("RGBa")
    placed = premultiplied.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    pixels = np.asarray(placed.convert("RGBA"), np.float32)
    coverage: Alpha = pixels[..., 3:] / np.float32(255)
    return pixels[..., :3], coverage


def tint(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    """The picture's brightness in one colour; its darkest parts stay dark, its brightest pale."""
    light = picture @ np.asarray((0.299, 0.587, 0.114), np.float32)[:, None] / 255  # (n, n, 1)
    base = np.asarray(colour, np.float32)
    shaded = base * np.clip(0.3 + 0.9 * light, 0, 1.05)
    return shaded + 0.35 * (255 - shaded) * np.clip(light - 0.85, 0, 1) / 0.15


def apply_look(picture: Picture, word: int) -> Picture:
    """The look of rare word number `word`: the first half are hues, the others patterns."""
    hues = WORD_COUNT // 2
    if word < hues:
        return _turn_hue(picture, word / hues)
    pattern, ink = divmod(word - hues, 6)
    inks = ("red", "yellow", "green", "blue", "purple", "white")
    mask = _pattern_mask(("striped", "dotted", "checkered", "ringed")[pattern])
    return picture * (1 - mask) + mask * np.asarray(COLOURS[inks[ink]], np.float32)


def shape_mask(
    name: str, size: float, centre: tuple[float, float], angle: float, side: int = CANVAS
) -> Alpha:
    """Coverage of a shape on the canvas, drawn at three times its resolution."""
    big = side * 3
    radius = size * big / 2
    image = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(image)
    x, y = centre[0] * big, centre[1] * big
    if name in ("circle", "ring", "crescent"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        hole = {"circle": 0.0, "ring": 0.55, "crescent": 0.85}[name] * radius
        shift = 0.45 * radius if name == "crescent" else 0.0
        if hole:
            draw.ellipse((x + shift - hole, y - hole, x + shift + hole, y + hole), fill=0)
    else:
        turn = math.radians(angle)
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        points = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _outline(name)]
        draw.polygon(points, fill=255)
    small = image.resize((side, side), Image.Resampling.BOX)
    coverage: Alpha = np.asarray(small, np.float32)[..., None] / np.float32(255)
    return coverage


@lru_cache(maxsize=32)
def _outline(name: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape within the unit circle, y downwards."""
    if name == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if name == "diamond":
        return ((0, -1), (0.68, 0), (0, 1), (-0.68, 0))
    if name == "cross":
        a, b = 0.32, 0.95
        corners = ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a))
        return corners + tuple((-u, -v) for u, v in corners)
    if name == "heart":
        turns = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        u = 16 * np.sin(turns) ** 3 / 17
        v = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns)) / 17 - 0.1
        return tuple((float(a), float(b)) for a, b in zip(u, v, strict=True))
    corners_of = {"triangle": 3, "hexagon": 6, "star": 10}[name]
    points = []
    for index in range(corners_of):
        length = 0.42 if name == "star" and index % 2 else 1.0
        turn = 2 * math.pi * index / corners_of - math.pi / 2
        points.append((length * math.cos(turn), length * math.sin(turn)))
    return tuple(points)


@lru_cache(maxsize=8)
def _pattern_mask(name: str) -> Alpha:
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    if name == "striped":
        mask = ((x + y) % 20) < 9
    elif name == "dotted":
        mask = ((x % 20 - 10) ** 2 + (y % 20 - 10) ** 2) < 40
    elif name == "checkered":
        mask = ((x // 12) + (y // 12)) % 2 < 1
    else:
        mask = (np.hypot(x - CANVAS / 2, y - CANVAS / 2) % 18) < 8
    coverage: Alpha = mask.astype(np.float32)[..., None]
    return coverage


def _apply_texture(picture: Picture, texture: str) -> Picture:
    """The texture in a paler (for dark colours) or darker shade of the picture's own colour."""
    bright = float(picture.mean()) > 150
    shade = picture * 0.6 if bright else picture * 0.45 + 255 * 0.55
    mask = _pattern_mask(texture)
    return picture * (1 - mask) + shade * mask


def _turn_hue(picture: Picture, turn: float) -> Picture:
    """Rotate all hues by `turn` (1 is the whole circle), and tint by a third towards that hue."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("HSV")
    hsv = np.asarray(image).copy()
    hsv[..., 0] += np.uint8(round(turn * 255))
    turned = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"), np.float32)
    pure = Image.new("HSV", (1, 1), (round(turn * 255), 235, 235)).convert("RGB").getpixel((0, 0))
    light: Picture = picture.mean(-1, keepdims=True) / 255
    return 0.6 * turned + 0.4 * light * np.asarray(pure, np.float32)
