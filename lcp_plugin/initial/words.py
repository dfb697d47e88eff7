"""Rare words for what is learned: one token each, and each for one task only.

A concept needs a word that the base ties to nothing yet, and that its tokenizer keeps whole, so
that one embedding stands for it (DreamBooth's rare tokens, arXiv 2208.12242, section 3.2). `RARE`
are such entries of CLIP's vocabulary: whole words of three or four letters among its last 12,000
merges, which are its least frequent, without those that are abbreviations of something well known.
"sks", which everybody uses, is the name of a rifle and not among them.

Where the base's tokenizer is on disk, each word is tried with it. Another vocabulary than CLIP's
(tiny-sdxl has its first 2,048 entries) gives its own: whole words of consonants, rarest first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lcp_plugin.errors import ConfigError

RARE = tuple(
    "ohwx olis phol zyk yql wwx lhp mwf nhm bhk gby sgh sqn srp tvn vcs wrs ghc csn hcs mnd mdt "
    "ptv rcn sff smx svt trc ttm bln brc cdp cfr clg csm dsm hns mdc nrf pdc rdr wcs swc nbl lgm "
    "kts bhm zshq snhl bwfc kzn gsc mth hmv csg".split()
)
IN_USE = frozenset("sks zwx zwz sbu uwu pdw twt zsn ofl psq cws wtc shs sts".split())  # by habit
_CONSONANTS = re.compile(r"^[bcdfghjklmnpqrstvwxz]{2,4}$")
_MEANT = frozenset("mr dr mrs tv vs pm ms bs st th cd dvd pc hd rt ft lb nd rd ss ww xx".split())
_END = "</w>"  # of an entry that ends a word, in CLIP's vocabulary


def is_rare(word: str) -> bool:
    """Whether a word is one that people use for a concept of their own."""
    return word in RARE or word in IN_USE


def looks_rare(word: str) -> bool:
    """Whether a word that a user wrote may be meant as one: known as such, or without a vowel."""
    consonants = bool(_CONSONANTS.match(word)) and len(word) > 2 and word not in _MEANT
    return is_rare(word) or consonants


def count_tokens(tokenizer: Any, word: str) -> int:
    """How many tokens a word falls into."""
    return len(tokenizer(word, add_special_tokens=False).input_ids)


def list_words(tokenizer: Any | None) -> Iterator[str]:
    """Rare words, the best first: those of `RARE` that the tokenizer keeps, then its own."""
    if tokenizer is None:
        yield from RARE
        return
    yield from (word for word in RARE if count_tokens(tokenizer, word) == 1)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    own = (entry.removesuffix(_END) for entry, _ in vocabulary if entry.endswith(_END))
    yield from (
        word
        for word in own
        if _CONSONANTS.match(word)
        and word not in _MEANT
        and word not in RARE
        and count_tokens(tokenizer, word) == 1
    )


def choose_words(count: int, tokenizer: Any | None, taken: Iterable[str]) -> list[str]:
    """`count` words that differ from each other and from all `taken`. Raises ConfigError."""
    used = {word.lower() for word in taken}
    free = [word for word in list_words(tokenizer) if word not in used]
    if len(free) < count:
        raise ConfigError(
            f"{count} tasks need a rare word each, and only {len(free)} are known; name folders as "
            "prompts shall call them, like 'sks dog', or make two configurations."
        )
    return free[:count]
