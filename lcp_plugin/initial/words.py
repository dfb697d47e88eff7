"""Rare words for what is learned: one token each, and each for one task only.

A concept needs a word that the base ties to nothing yet, and that its tokenizer keeps whole, so
that one embedding stands for it (DreamBooth's rare tokens, arXiv 2208.12242, section 3.2). `RARE`
are such entries of CLIP's vocabulary: whole words of three or four letters among its last 12,000
merges, which are its least frequent, without those that are abbreviations of something well known.
"sks", which everybody uses, is the name of a rifle and not among them.

Where the base's tokenizer is on disk, each word is tried with it, and none is taken whose token
stands in the words of another task. tiny-sdxl has only the first 2,048 entries of the vocabulary,
too few for rare words: `ENDINGS` are such of its entries as only end words ("vely" of "lovely"),
are no word by themselves, and are in none of its base's captions. Any other vocabulary gives its
own whole words of three or four consonants, rarest first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import counted

RARE = tuple(
    "ohwx olis phol zyk yql wwx lhp mwf nhm bhk gby sgh sqn srp tvn vcs wrs ghc csn hcs mnd mdt "
    "ptv rcn sff smx svt trc ttm bln brc cdp cfr clg csm dsm hns mdc nrf pdc rdr wcs swc nbl lgm "
    "kts bhm zshq snhl bwfc kzn gsc mth hmv csg".split()
)
ENDINGS = tuple(
    "vely ssed pped cks shing ghts gest ined thers ator ments aking ility atest pping ality ssion "
    "ards sday tball sted tting ching uring dge oud ween rence ience unch dents ities iness tive "
    "ining ved mber onal ould ough ving ying ence iting ening ition ight ght".split()
)
IN_USE = frozenset("sks zwx zwz sbu uwu pdw twt zsn ofl psq cws wtc shs sts".split())  # by habit
_CONSONANTS = re.compile(r"^[bcdfghjklmnpqrstvwxz]{3,4}$")
_MEANT = frozenset("mrs dvd cnn bbc nfl nhl mlb nba www xxx gps ftw tbt hdr pvc html http".split())
_END = "</w>"  # of an entry that ends a word, in CLIP's vocabulary


def is_rare(word: str) -> bool:
    """Whether a word is one that people use for a concept of their own."""
    return word in RARE or word in ENDINGS or word in IN_USE


def looks_rare(word: str) -> bool:
    """Whether a word that a user wrote may be meant as one: known as such, or without a vowel."""
    return is_rare(word) or bool(_CONSONANTS.match(word)) and word not in _MEANT


def count_tokens(tokenizer: Any, word: str) -> int:
    """How many tokens a word falls into."""
    return len(_tokens(tokenizer, word))


def list_words(tokenizer: Any | None) -> Iterator[str]:
    """Rare words, the best first: those of ours that the tokenizer keeps, then its own."""
    if tokenizer is None:
        yield from RARE
        return
    known = (*RARE, *ENDINGS)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    own = (entry.removesuffix(_END) for entry, _ in vocabulary if entry.endswith(_END))
    own = (word for word in own if _CONSONANTS.match(word) and word not in {*_MEANT, *known})
    yield from (word for word in (*known, *own) if count_tokens(tokenizer, word) == 1)


def choose_words(count: int, tokenizer: Any | None, taken: Iterable[str]) -> list[str]:
    """`count` words that differ from each other and share no token with `taken`.

    Raises ConfigError where there are fewer.
    """
    used = {word.lower() for word in taken}
    spoken = {token for word in used for token in _tokens(tokenizer, word)}
    free = [
        word
        for word in list_words(tokenizer)
        if word not in used and spoken.isdisjoint(_tokens(tokenizer, word))
    ]
    if len(free) < count:
        raise ConfigError(
            f"{counted(count, 'task')} to name, and only {counted(len(free), 'rare word')} left; "
            "name folders as prompts shall call them, like 'sks dog', or make two configurations."
        )
    return free[:count]


def _tokens(tokenizer: Any | None, word: str) -> list[int]:
    """A word's tokens; none where they cannot be known."""
    return [] if tokenizer is None else tokenizer(word, add_special_tokens=False).input_ids
