"""The captioned world that the embedded base learns: what a scene is, which exist, how one is told.

A scene is a subject (a shape or an emoji) with a colour, a texture or the look of a rare word, on a
background. Everything is drawn from a generator, so a world is a function of its seed. One
combination in ten of subject with background, or of subject with colour, is held out: the base
never sees it, and the gate (gate.py) asks for exactly these.

Rare words: 48 nonsense words each stand for a look (a hue or an overlaid pattern), so that the text
encoders learn to tell unknown words apart. The tokens of the paper's tasks are not among them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 140, 25),
    "yellow": (248, 220, 50),
    "green": (40, 165, 65),
    "blue": (40, 90, 225),
    "purple": (140, 55, 190),
    "pink": (250, 140, 190),
    "brown": (130, 80, 45),
    "black": (25, 25, 28),
    "white": (248, 248, 246),
    "gray": (140, 140, 145),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "ring",
    "diamond",
    "cross",
    "hexagon",
    "crescent",
)
EMOJI: dict[str, str] = {  # concept -> code points, the file name in both emoji packages
    "dog": "1f436",
    "cat": "1f431",
    "panda": "1f43c",
    "fox": "1f98a",
    "bear": "1f43b",
    "frog": "1f438",
    "pig": "1f437",
    "monkey": "1f435",
    "lion": "1f981",
    "rabbit": "1f430",
    "penguin": "1f427",
    "owl": "1f989",
    "duck": "1f986",
    "fish": "1f420",
    "whale": "1f433",
    "turtle": "1f422",
    "octopus": "1f419",
    "snail": "1f40c",
    "butterfly": "1f98b",
    "ladybug": "1f41e",
    "car": "1f697",
    "bus": "1f68c",
    "boat": "26f5",
    "airplane": "2708-fe0f",
    "rocket": "1f680",
    "house": "1f3e0",
    "tree": "1f333",
    "cactus": "1f335",
    "flower": "1f33b",
    "mushroom": "1f344",
    "apple": "1f34e",
    "banana": "1f34c",
    "cherries": "1f352",
    "strawberry": "1f353",
    "watermelon": "1f349",
    "pizza": "1f355",
    "hamburger": "1f354",
    "donut": "1f369",
    "cup": "2615",
    "teapot": "1fad6",
    "bowl": "1f963",
    "can": "1f96b",
    "vase": "1f3fa",
    "candle": "1f56f-fe0f",
    "clock": "23f0",
    "guitar": "1f3b8",
    "ball": "26bd",
    "book": "1f4d5",
    "umbrella": "2602-fe0f",
    "backpack": "1f392",
    "boot": "1f97e",
    "sneaker": "1f45f",
    "glasses": "1f453",
    "sunglasses": "1f576-fe0f",
    "robot": "1f916",
    "ghost": "1f47b",
    "teddy bear": "1f9f8",
    "monster": "1f47e",
    "crown": "1f451",
    "gift": "1f381",
    "balloon": "1f388",
    "hat": "1f3a9",
    "wizard": "1f9d9",
    "mirror": "1fa9e",
}
SYNONYMS = {
    "teddy bear": ("teddy bear", "stuffed animal", "toy"),
    "monster": ("monster", "cartoon"),
    "bowl": ("bowl",),
    "sneaker": ("sneaker", "shoe"),
}
PLURAL = ("glasses", "sunglasses", "cherries")
SETS = ("google", "twitter")  # Noto, Twemoji: the names of the npm packages' folders
SCENES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "on top of green grass"),
    "snow": ("in the snow",),
    "beach": ("on the beach",),
    "night": ("at night",),
    "brick": ("in front of a brick wall",),
    "wood": ("on a wooden floor",),
    "water": ("in the water", "floating on top of water"),
    "city": ("in the city", "with a city in the background"),
    "mountain": ("in the mountains", "with a mountain in the background"),
    "jungle": ("in the jungle", "in the forest"),
    "street": ("on a cobblestone street",),
    "desert": ("in the desert",),
}
BACKGROUNDS = (*SCENES, *COLOURS)
TEXTURES = ("striped", "dotted", "checkered")
WORD_COUNT = 48
RESERVED_WORDS = ("sks", "zwz", "sbu", "uwu", "pdw", "twt", "zsn", "ofl", "psq", "cws", "olb")


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn. Lengths are shares of the picture's side."""

    subject: str
    background: str
    colour: str | None = None  # of a shape always; of an emoji when it is tinted
    texture: str | None = None
    word: int | None = None  # index of the rare word whose look the subject wears
    sprite_set: str = SETS[0]
    centre: tuple[float, float] = (0.5, 0.5)
    size: float = 0.7
    angle: float = 0.0  # degrees
    flip: bool = False
    detail: int = 0  # seed of everything else: background variant, jitter of colours

    @property
    def is_shape(self) -> bool:
        """A drawn shape, not an emoji."""
        return self.subject in SHAPES


def rare_words() -> tuple[str, ...]:
    """The 48 words bound to a look: three letters, no English word among CLIP's common ones."""
    rng = np.random.default_rng(48)
    words: list[str] = []
    while len(words) < WORD_COUNT:
        word = random_word(rng)
        if word not in words:
            words.append(word)
    return tuple(words)


def random_word(rng: np.random.Generator) -> str:
    """A nonsense word of three letters, never one of the tasks' tokens."""
    consonants, letters = "bcdfghjklmnpqrstvwxz", "abcdefghijklmnopqrstuvwxyz"
    while True:
        word = _pick(rng, consonants) + _pick(rng, letters) + _pick(rng, consonants)
        if word not in RESERVED_WORDS:
            return word


def is_held_out(first: str, second: str) -> bool:
    """Whether the base must not see this pair: one pair in ten, the same in every world."""
    return zlib.crc32(f"{first}|{second}".encode()) % 10 == 0


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A scene of the training world, or one whose subject and background are a held-out pair."""
    while True:
        scene = _sample_shape(rng) if rng.random() < 0.28 else _sample_emoji(rng)
        pair = is_held_out(scene.subject, scene.background)
        tint = scene.colour is not None and is_held_out(scene.subject, scene.colour)
        if (pair and not tint) if held_out else not (pair or tint):
            return scene


def describe_scene(scene: Scene, rng: np.random.Generator) -> str:
    """A caption. What it names is true; it may leave out the background or the place."""
    words = []
    if scene.word is not None:
        words.append(rare_words()[scene.word])
    elif rng.random() < 0.04:
        words.append(random_word(rng))  # means nothing
    words += [part for part in (scene.colour, scene.texture) if part is not None]
    name = _pick(rng, SYNONYMS.get(scene.subject, (scene.subject,)))
    noun = _with_article([*words, name], plural=scene.subject in PLURAL)
    parts = [noun]
    if rng.random() < 0.88:
        parts.append(describe_background(scene.background, rng))
    place = describe_place(scene)
    if place and rng.random() < 0.5:
        parts.append(place)
    return _pick(rng, _openings(scene)) + " ".join(parts)


def describe_background(background: str, rng: np.random.Generator) -> str:
    """The caption's part on the background, such as "on the beach"."""
    if background in SCENES:
        return _pick(rng, SCENES[background])
    article = "an" if background[0] in "aeiou" else "a"
    return f"on {article} {background} background"


def describe_place(scene: Scene) -> str | None:
    """Where the subject is, if that is worth telling."""
    x, y = scene.centre
    if max(abs(x - 0.5), abs(y - 0.5)) < 0.13:
        return None
    if abs(x - 0.5) >= abs(y - 0.5):
        return "on the left" if x < 0.5 else "on the right"
    return "at the top" if y < 0.5 else "at the bottom"


def _sample_shape(rng: np.random.Generator) -> Scene:
    colour = _pick(rng, tuple(COLOURS))
    background = _pick(rng, tuple(name for name in BACKGROUNDS if name != colour))
    worded = rng.random() < 0.1
    textured = not worded and rng.random() < 0.3
    size = float(rng.uniform(0.38, 0.72))
    reach = (1 - size) / 2 * 0.9
    return Scene(
        subject=_pick(rng, SHAPES),
        background=background,
        colour=None if worded else colour,
        texture=_pick(rng, TEXTURES) if textured else None,
        word=int(rng.integers(WORD_COUNT)) if worded else None,
        centre=(0.5 + float(rng.uniform(-reach, reach)), 0.5 + float(rng.uniform(-reach, reach))),
        size=size,
        angle=float(rng.uniform(-12, 12)),
        detail=int(rng.integers(2**31)),
    )


def _sample_emoji(rng: np.random.Generator) -> Scene:
    kind = rng.random()
    tinted, worded = kind < 0.25, 0.25 <= kind < 0.62
    colour = _pick(rng, tuple(COLOURS)) if tinted else None
    background = _pick(rng, tuple(name for name in BACKGROUNDS if name != colour))
    size = float(rng.uniform(0.66, 0.92))
    reach = max(0.04, (1 - size) / 2)
    return Scene(
        subject=_pick(rng, tuple(EMOJI)),
        background=background,
        colour=colour,
        word=int(rng.integers(WORD_COUNT)) if worded else None,
        sprite_set=SETS[int(rng.random() < 0.25)],
        centre=(0.5 + float(rng.uniform(-reach, reach)), 0.5 + float(rng.uniform(-reach, reach))),
        size=size,
        angle=float(rng.uniform(-14, 14)),
        flip=bool(rng.random() < 0.5),
        detail=int(rng.integers(2**31)),
    )


def _openings(scene: Scene) -> tuple[str, ...]:
    if scene.is_shape:
        return ("", "", "a picture of ", "an image of ")
    if scene.sprite_set == "twitter":
        return ("", "a drawing of ", "a flat drawing of ", "an image of ")
    return ("", "a photo of ", "a picture of ", "an image of ")


def _with_article(words: list[str], plural: bool) -> str:
    if plural and len(words) == 1:
        return words[0]
    article = "an" if words[0][0] in "aeio" else "a"
    return f"{article} {' '.join(words)}"


def _pick(rng: np.random.Generator, options: str | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
