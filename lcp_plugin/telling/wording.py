"""Words that many places say alike: numbers with nouns, durations, clocks, commands to paste.

A noun's plural is English's regular one (image, images; batch, batches; copy, copies) unless it is
given. A command is quoted for the shell at hand: POSIX's, or on Windows so that cmd and PowerShell
both take it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLAIN_ON_WINDOWS = re.compile(r"[\w.:=+~/\\-]+", re.ASCII)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 image`, `2 images`; from 10,000 on with commas."""
    shown = f"{number:,}" if abs(number) >= 10_000 else str(number)
    return f"{shown} {agree(number, noun, plural)}"


def agree(number: object, one: str, many: str = "") -> str:
    """The noun or verb that goes with a number: `one` for 1, else `many` (its regular plural)."""
    return one if number == 1 else many or _plural_of(one)


def in_words(count: int) -> str:
    """`four`; digits above ten."""
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def join_names(names: Sequence[str]) -> str:
    """`a, b and c`."""
    head, last = ", ".join(names[:-1]), names[-1]
    return f"{head} and {last}" if head else last


def say_duration(seconds: float) -> str:
    """`40 s`, `7 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def say_moment(moment: float, now: float | None = None) -> str:
    """The clock at a moment: `14:32`, on another day `Sat 14:32`, beyond a week its date."""
    now = time.time() if now is None else now
    here, then = time.localtime(now), time.localtime(moment)
    if here[:3] == then[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if moment - now < 6 * 86400 else "%Y-%m-%d", then)


def quote(word: str) -> str:
    """A word as this system's shell takes it."""
    if os.name != "nt":
        return shlex.quote(word)
    if _PLAIN_ON_WINDOWS.fullmatch(word):
        return word
    quoted = subprocess.list2cmdline([word])
    return quoted if quoted.startswith('"') else f'"{quoted}"'


def join_words(words: Sequence[str]) -> str:
    """A command line that can be pasted."""
    return " ".join(map(quote, words))


def _plural_of(noun: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{noun}s"
