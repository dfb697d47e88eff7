"""What image files hold: read and hashed once in a process, decoded once before a model is loaded.

A file is known by path, size and time of change, so that an edited one is read anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.errors import DataError
from lcp_plugin.formats.pictures import decode, read_size

LARGE = 50_000_000  # pixels; decoded one at a time, the others eight at once
THREADS = 8


@dataclass(frozen=True)
class Contents:
    """What is known of one file."""

    digest: str  # sha256, hex
    size: tuple[int, int]  # (width, height) of the upright picture
    decoded: bool = False  # whether its pixels were looked at


_known: dict[tuple[str, int, int], Contents] = {}


def read_contents(path: Path, decodes: bool = False) -> Contents:
    """Digest and size of a picture; with `decodes` its pixels are tried too.

    Raises:
        DataError: missing, not a picture, or (with `decodes`) damaged anywhere.
    """
    key = _key_of(path)
    found = _known.get(key)
    if found is not None and (found.decoded or not decodes):
        return found
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"image {path} cannot be read ({error.strerror}); restore or remove it."
        ) from None
    size = read_size(path, data)
    if decodes:
        decode(path, data)
    _known[key] = Contents(hashlib.sha256(data).hexdigest(), size, decodes)
    return _known[key]


def check_pictures(paths: Iterable[Path]) -> None:
    """Decodes every picture, eight at once. Raises DataError naming five of the damaged at most."""
    wanted = sorted(set(paths))
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(_size_if_readable, wanted))
        small = [path for path, size in zip(wanted, sizes, strict=True) if size <= LARGE]
        found = dict(zip(small, pool.map(_find_problem, small), strict=True))
    found |= {path: _find_problem(path) for path in wanted if path not in found}
    problems = [problem for path in wanted if (problem := found[path]) is not None]
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        more = f" ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{len(problems)} images cannot be used: {' '.join(problems[:5])}{more}")


def _key_of(path: Path) -> tuple[str, int, int]:
    try:
        facts = path.stat()
    except OSError as error:
        raise DataError(
            f"image {path} cannot be read ({error.strerror}); restore or remove it."
        ) from None
    return str(path), facts.st_size, facts.st_mtime_ns


def _size_if_readable(path: Path) -> int:
    """Pixels; 0 for what `_find_problem` will refuse."""
    try:
        width, height = read_size(path)
    except DataError:
        return 0
    return width * height


def _find_problem(path: Path) -> str | None:
    try:
        read_contents(path, decodes=True)
    except DataError as error:
        return str(error)
    return None
