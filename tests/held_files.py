"""Windows' rule on a system that has none: what this process holds is not replaced or removed.

There a file that is open or mapped can be neither renamed nor removed nor renamed over, and a
folder cannot be renamed while it holds such a file. Linux says what a process has mapped
(/proc/self/maps) and open (/proc/self/fd).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROC = Path("/proc/self")
CAN_TELL = (PROC / "maps").is_file() and (PROC / "fd").is_dir()
MOVES = ("replace", "rename")
REMOVALS = ("remove", "unlink")


def held_files() -> dict[str, str]:
    """Regular files that this process has mapped or open: path -> how."""
    found = {}
    for handle in (PROC / "fd").iterdir():
        try:
            target = os.readlink(handle)
        except OSError:  # the listing's own
            continue
        if os.path.isfile(target):
            found[target] = "open"
    for line in (PROC / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/"):
            found[parts[5]] = "mapped"
    return found


def absolute(path: Any, folder: int | None) -> str:
    """A path as /proc tells it; `folder` is a handle that a relative one counts from."""
    text = os.fspath(path)
    text = text.decode() if isinstance(text, bytes) else text
    start = os.getcwd() if folder is None else os.readlink(PROC / "fd" / str(folder))
    whole = os.path.join(start, text)
    return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))


@contextmanager
def as_on_windows(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was refused in the block: each is a PermissionError where it happened, too."""
    refused: list[str] = []

    def refuse_held(call: str, *paths: str) -> None:
        for path in paths:
            for held, how in held_files().items():
                if held == path or held.startswith(f"{path}/"):
                    refused.append(f"{call} {path}: {held} is {how}")
                    raise PermissionError(13, f"is {how}", path)

    def watched(call: str, real: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(real)
        def move(source: Any, target: Any, **more: Any) -> None:
            places = (more.get("src_dir_fd"), more.get("dst_dir_fd"))
            refuse_held(call, *map(absolute, (source, target), places))
            real(source, target, **more)

        @functools.wraps(real)
        def remove(path: Any, **more: Any) -> None:
            refuse_held(call, absolute(path, more.get("dir_fd")))
            real(path, **more)

        return move if call in MOVES else remove

    with patch.context() as inner:
        for call in (*MOVES, *REMOVALS):
            inner.setattr(os, call, watched(call, getattr(os, call)))
        yield refused
