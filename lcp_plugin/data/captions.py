"""Captions: read from files, then shuffled, dropped and joined by kohya's rules.

Rules as in kohya-ss/sd-scripts (library/train_util.py process_caption, at 48d368fa), in this order:
prefix and suffix; dropout of the whole caption; wildcards; tags kept, warmed up, shuffled, dropped
and joined with ", "; the secondary separator. Where we differ: keep_tokens_separator is taken out
even where nothing is shuffled.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.datasets import SubsetConfig
from lcp_plugin.errors import DataError

_WILDCARD = re.compile(r"\{([^{}]+)\}")
_WEIGHT = re.compile(r"\\.|\(|\[|:\s*([+-]?\d*\.?\d+)\s*\)|\)|\]|[^\\()\[\]:]+|:")


@dataclass(frozen=True)
class CaptionSettings:
    """What becomes of a caption on its way to the text encoders; nothing by default."""

    prefix: str | None = None
    suffix: str | None = None
    separator: str = ","  # of tags
    secondary_separator: str | None = None  # becomes the separator in the end
    shuffles: bool = False
    keep_tokens: int = 0  # tags in front that stay where they are
    keep_tokens_separator: str = ""  # what stays stands before it, and behind a second one
    has_wildcards: bool = False  # {a|b}, and one line of several
    dropout_rate: float = 0.0  # of whole captions
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    warmup_min: int = 1  # tags at the first step
    warmup_step: float = 0  # at which all tags are there; below 1 a share of all steps

    @classmethod
    def of(cls, subset: SubsetConfig) -> CaptionSettings:
        """What a subset asks for."""
        return cls(
            prefix=subset.caption_prefix,
            suffix=subset.caption_suffix,
            separator=subset.caption_separator,
            secondary_separator=subset.secondary_separator,
            shuffles=subset.shuffle_caption,
            keep_tokens=subset.keep_tokens,
            keep_tokens_separator=subset.keep_tokens_separator,
            has_wildcards=subset.enable_wildcard,
            dropout_rate=subset.caption_dropout_rate,
            dropout_every_n_epochs=subset.caption_dropout_every_n_epochs,
            tag_dropout_rate=subset.caption_tag_dropout_rate,
            warmup_min=subset.token_warmup_min,
            warmup_step=subset.token_warmup_step,
        )

    @property
    def varies(self) -> bool:
        """Whether a caption may differ from step to step, other than being dropped as a whole."""
        moves = self.shuffles or self.has_wildcards
        return moves or self.tag_dropout_rate > 0 or self.warmup_step > 0

    @property
    def drops(self) -> bool:
        """Whether whole captions may be dropped."""
        return self.dropout_rate > 0 or self.dropout_every_n_epochs > 0

    def without_chance(self) -> CaptionSettings:
        """The same, but that nothing is dropped, shuffled or held back."""
        return replace(
            self,
            dropout_rate=0.0,
            dropout_every_n_epochs=0,
            shuffles=False,
            tag_dropout_rate=0.0,
            warmup_step=0,
        )


@dataclass(frozen=True)
class CaptionTime:
    """When a caption is drawn; it steers dropout by epochs and the warm-up of tags."""

    epoch: int = 0  # from 0
    step: int = 0  # optimizer steps so far in the task
    total_steps: int = 1


def read_caption(path: Path) -> str:
    """The text of a caption file without surrounding blanks. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"caption {path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"caption {path} cannot be read ({error.strerror}).") from None
    return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())


def read_metadata(path: Path) -> Mapping[str, str]:
    """Image key -> caption of a fine-tuning JSON; tags follow the caption. Raises DataError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(table, dict) or not all(isinstance(e, dict) for e in table.values()):
            raise ValueError("a table of images is wanted, each with a table of its own")
        return {str(key): _join_metadata(entry) for key, entry in table.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"metadata {path} cannot be read ({error}); wanted JSON like "
            f'{{"image": {{"caption": "...", "tags": "..."}}}}.'
        ) from None


def _join_metadata(entry: Mapping[str, Any]) -> str:
    parts = [str(entry[key]) for key in ("caption", "tags") if entry.get(key)]
    return ", ".join(parts)


def process_caption(
    text: str, settings: CaptionSettings, generator: random.Random, time: CaptionTime
) -> str:
    """The caption as the text encoders get it at this moment; draws from `generator` only."""
    caption = " ".join(p for p in (settings.prefix, text, settings.suffix) if p)
    if _is_dropped(settings, generator, time):
        return ""
    lines = caption.split("\n")
    if settings.has_wildcards:
        caption = fill_wildcards(generator.choice(lines), generator)
    else:
        caption = lines[0]
    if settings.shuffles or settings.warmup_step > 0 or settings.tag_dropout_rate:
        caption = _process_tags(caption, settings, generator, time)
    elif settings.keep_tokens_separator:
        parts = caption.split(settings.keep_tokens_separator)
        caption = f"{settings.separator} ".join(p.strip(" ,") for p in parts if p.strip(" ,"))
    if settings.secondary_separator:
        caption = caption.replace(settings.secondary_separator, settings.separator)
    return caption


def _is_dropped(settings: CaptionSettings, generator: random.Random, time: CaptionTime) -> bool:
    rate, every = settings.dropout_rate, settings.dropout_every_n_epochs
    by_chance = rate > 0 and generator.random() < rate
    return by_chance or (every > 0 and (time.epoch + 1) % every == 0)


def fill_wildcards(caption: str, generator: random.Random) -> str:
    """One alternative of every {a|b}; {{ and }} stand for braces."""
    opening, closing = "\x00", "\x01"  # cannot stand in a caption
    masked = caption.replace("{{", opening).replace("}}", closing)
    filled = _WILDCARD.sub(lambda m: generator.choice(m.group(1).split("|")), masked)
    return filled.replace(opening, "{").replace(closing, "}")


def _process_tags(
    caption: str, settings: CaptionSettings, generator: random.Random, time: CaptionTime
) -> str:
    first, flexible, last = split_tags(caption, settings)
    flexible = _warm_up(flexible, settings, time)
    if settings.shuffles:
        generator.shuffle(flexible)
    rate = settings.tag_dropout_rate
    if rate > 0:
        flexible = [tag for tag in flexible if generator.random() >= rate]
    return ", ".join([*first, *flexible, *last])


def split_tags(caption: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """Tags kept in front, tags that may move, tags kept at the end."""

    def tags(text: str) -> list[str]:
        parts = text.split(settings.separator) if settings.separator else [text]
        return [t.strip() for t in parts if t.strip()]

    separator = settings.keep_tokens_separator
    if separator and separator in caption:
        front, _, rest = caption.partition(separator)
        middle, _, end = rest.partition(separator)
        return tags(front), tags(middle), tags(end)
    every = tags(caption)
    return every[: settings.keep_tokens], every[settings.keep_tokens :], []


def _warm_up(tags: list[str], settings: CaptionSettings, time: CaptionTime) -> list[str]:
    """So many of the first tags as the warm-up allows at this step."""
    end = settings.warmup_step
    if end < 1:
        end = math.floor(end * time.total_steps)
    if end <= 0 or time.step >= end:
        return tags
    grown = math.floor(time.step * (len(tags) - settings.warmup_min) / end)
    return tags[: max(0, grown + settings.warmup_min)]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Pieces of text with their weights: (x) 1.1, [x] 1/1.1, (x:1.5) 1.5, nesting multiplies.

    Backslash takes the meaning from a bracket. Unclosed brackets weigh what follows them.
    """
    pieces: list[list[Any]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _WEIGHT.finditer(prompt):
        token = match.group(0)
        if token == "(":
            open_round.append(len(pieces))
        elif token == "[":
            open_square.append(len(pieces))
        elif match.group(1) is not None and open_round:
            multiply(open_round.pop(), float(match.group(1)))
        elif token == ")" and open_round:
            multiply(open_round.pop(), 1.1)
        elif token == "]" and open_square:
            multiply(open_square.pop(), 1 / 1.1)
        else:
            pieces.append([token[1:] if token.startswith("\\") else token, 1.0])
    for start in open_round:
        multiply(start, 1.1)
    for start in open_square:
        multiply(start, 1 / 1.1)
    return _joined(pieces)


def _joined(pieces: list[list[Any]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight become one piece."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
