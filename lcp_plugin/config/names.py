"""Names of files and folders that every system takes: Linux, Windows and macOS.

Windows refuses these names with any suffix, names that end in a dot or a blank, and, by default,
paths of more than 259 characters (Microsoft, "Naming Files, Paths, and Namespaces").
"""

from __future__ import annotations

import re

LONGEST_NAME = 80  # characters
LONGEST_PATH = 259  # characters, of Windows unless it is told otherwise
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FOLDER = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9 ._-]{{0,{LONGEST_NAME - 1}}}")
_NEVER = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


def is_fit_anywhere(name: str) -> bool:
    """Whether every system takes a file or folder of this name; letters of any language."""
    trimmed = name.strip(". ") == name
    return trimmed and not _NEVER.search(name) and not _RESERVED.fullmatch(name)


def is_fit_as_folder(name: str) -> bool:
    """Whether it is, too, of plain letters, and short enough for a task's folder."""
    return bool(_FOLDER.fullmatch(name)) and is_fit_anywhere(name)


def make_fit(text: str, otherwise: str) -> str:
    """A text as part of a name, cut and with _ for what a system refuses."""
    return _NEVER.sub("_", text)[:LONGEST_NAME].strip(" .") or otherwise
