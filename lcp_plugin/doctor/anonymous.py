"""Text without what tells who and where its writer is: folders, files, user, host, tasks' words.

A path becomes `<path 1>` and keeps its suffix; the same path gets the same number, so that a reader
sees what was one file. A known word (the user's name, a task's) becomes what it is, `<user>`.
"""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterable
from pathlib import Path

_ROOT = r"(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*[\\/]|/(?=[\w.~-]))"  # C:\, \\server, ~/, ~anna/, /
_QUOTED = re.compile(rf"(?P<quote>['\"`])(?P<path>{_ROOT}[^'\"`\n]*)(?P=quote)")
_BARE = re.compile(rf"(?<![\w<>./\\~:-]){_ROOT}[^\s'\"`,;:()\[\]{{}}|]*")
_SUFFIX = re.compile(r"\.(safetensors|toml|json|txt|png|jpe?g|webp|ckpt|pt|csv|html)$", re.I)
_SHORTEST = 2  # letters of a word that is looked for


class Anonymiser:
    """Replaces paths and known words; the numbers of paths go on from text to text."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._own = own_words()

    def path(self, path: str) -> str:
        """The number of a path, and its suffix where that says what kind of file it is."""
        plain = path.replace("\\", "/").rstrip("/") or "/"
        number = self._numbers.setdefault(plain, len(self._numbers) + 1)
        suffix = _SUFFIX.search(plain)
        return f"<path {number}>{suffix[0].lower() if suffix else ''}"

    def text(self, text: str, words: Iterable[tuple[str, str]] = ()) -> str:
        """The text with absolute paths and known words replaced.

        Args:
            words: (word, what it is), beside the names of this machine and of its user.
        """
        text = _QUOTED.sub(lambda m: f"{m['quote']}{self.path(m['path'])}{m['quote']}", text)
        text = _BARE.sub(lambda m: self.path(m[0]), text)
        for word, what in sorted({*words, *self._own}, key=lambda pair: (-len(pair[0]), pair)):
            if len(word) < _SHORTEST:
                continue
            pattern = rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
            text = re.sub(pattern, f"<{what}>".replace("\\", "/"), text, flags=re.IGNORECASE)
        return text


def own_words() -> list[tuple[str, str]]:
    """The names of this machine and of who uses it, as (word, what it is)."""
    host = platform.node()
    found = [(host, "host"), (host.split(".")[0], "host"), (Path.home().name, "user")]
    try:
        found.append((getpass.getuser(), "user"))
    except (OSError, KeyError, ImportError):  # no name is known: a container, Windows
        pass
    return found
