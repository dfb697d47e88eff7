"""Object or style: guessed from names and captions, with the reason in words.

In this order: what the user says; a word of a style in the folder's name; a folder for each motif;
captions; the images' file names. Nothing that speaks: an object, as most folders of photos are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lcp_plugin.errors import ConfigError
from lcp_plugin.initial.survey import Photos, walk_stems
from lcp_plugin.tasks import Kind
from lcp_plugin.telling.wording import agree, counted

KINDS: tuple[Kind, ...] = ("object", "style")
STYLE_WORDS = frozenset(
    "style styles art artwork painting paintings watercolor watercolour watercolors watercolours "
    "aquarelle gouache pastel pastels charcoal sketch sketches drawing drawings doodle doodles "
    "illustration illustrations lineart engraving etching woodcut linocut lithograph risograph "
    "anime manga comic comics pixelart mosaic fresco graffiti collage calligraphy blueprint "
    "claymation lowpoly vaporwave synthwave steampunk cyberpunk noir sepia halftone".split()
)
_STYLE_PHRASES = re.compile(r"\b(oil|ink|line art|pixel art|stained glass|pop art|ukiyo e)\b")
_ISM = re.compile(r"^[a-z]{3,}ism$")  # cubism, impressionism
_CAMERA = frozenset(  # what cameras, phones and tools name files, not what is on them
    "img image images dsc dscn dscf pxl mvi gopr dji photo photos pic picture screenshot screen "
    "shot scan frame vlcsnap whatsapp file download untitled copy signal unnamed edited".split()
)
SHARE = 0.5  # of captions or file names that must agree
MANY = 4  # images with names, below which different names say nothing


@dataclass(frozen=True)
class Guess:
    """A kind and why."""

    kind: Kind
    why: str


def read_kinds(given: Sequence[str], names: Sequence[str]) -> Mapping[str, Kind]:
    """Folder -> kind of `--kind style` (all) or `--kind FOLDER=style ...`. Raises ConfigError."""
    found: dict[str, Kind] = {}
    for text in given:
        folder, _, kind = text.rpartition("=")
        known = next((k for k in KINDS if k == kind.strip().lower()), None)
        if known is None:
            raise ConfigError(f"--kind {text}: wanted object, style, or FOLDER=object|style.")
        if folder and folder not in names:
            raise ConfigError(f"--kind {text}: no folder of that name; there are {list(names)}.")
        found |= {folder: known} if folder else dict.fromkeys(names, known)
    return found


def guess_kind(photos: Photos) -> Guess:
    """What a folder of photos shows: one thing, or one way of showing things."""
    guesses = (_by_folder, _by_layout, _by_captions, _by_files)
    found = next((guess for by in guesses if (guess := by(photos))), None)
    return found or Guess("object", "guessed: nothing says that it is a style")


def find_style_word(text: str) -> str:
    """The first word of a text that names a way of drawing; empty without one."""
    phrase = _STYLE_PHRASES.search(text.lower())
    words = re.findall(r"[a-z]+", text.lower())
    found = next((word for word in words if word in STYLE_WORDS or _ISM.match(word)), "")
    return found or (phrase[0] if phrase else "")


def _by_folder(photos: Photos) -> Guess | None:
    word = find_style_word(photos.words)
    return Guess("style", f"guessed: the folder's name says '{word}'") if word else None


def _by_layout(photos: Photos) -> Guess | None:
    if not photos.has_motifs:
        return None
    names = ", ".join(shelf.folder.name for shelf in photos.shelves[:3])
    return Guess("style", f"guessed: a folder for each motif ({names})")


def _by_captions(photos: Photos) -> Guess | None:
    texts = photos.captions.texts
    if not texts:
        return None
    noun = photos.words.split()[-1]
    named = sum(noun in re.findall(r"\w+", text.lower()) for text in texts)
    if named >= SHARE * len(texts):
        return Guess("object", _say_shared(named, len(texts), "caption", noun))
    styled = [word for text in texts if (word := find_style_word(text))]
    if len(styled) >= SHARE * len(texts):
        word = Counter(styled).most_common(1)[0][0]
        return Guess("style", _say_shared(len(styled), len(texts), "caption", word))
    return None


def _by_files(photos: Photos) -> Guess | None:
    named = [
        words
        for stem in walk_stems(photos)
        if (words := {w for w in re.findall(r"[a-z]{3,}", stem) if w not in _CAMERA})
    ]
    if len(named) < max(2, SHARE * len(photos.images)):
        return None
    counts = Counter(word for words in named for word in words)
    word, often = counts.most_common(1)[0]
    if often >= SHARE * len(named):
        kind: Kind = "style" if find_style_word(word) else "object"
        return Guess(kind, _say_shared(often, len(photos.images), "file name", word))
    if len(named) < MANY:
        return None
    shown = ", ".join(sorted(counts)[:3])
    return Guess("style", f"guessed: each file name says something else ({shown}, ...)")


def _say_shared(number: int, total: int, what: str, word: str) -> str:
    """`guessed: 3 of 4 captions say 'dog'`."""
    return f"guessed: {number} of {counted(total, what)} {agree(number, 'says', 'say')} '{word}'"
