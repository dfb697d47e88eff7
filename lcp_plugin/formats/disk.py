"""What every write is: all or nothing. JSON, free space and the cache folder beside it.

A write goes to a temporary file in the same folder, is flushed and synced, renamed into place, and
the folder is synced. Until the rename the old file is whole; after it the new one is.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lcp_plugin.errors import DiskError, FileFormatError, NumericError

MAX_JSON_BYTES = 256_000_000
_PIECE = 1 << 20  # bytes of one write: Linux takes several times longer for much larger ones
_BEHIND = 1 << 24  # bytes after which the disk is told to begin
_UNUSABLE = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,  # a folder is to be made where a file is
)


# ------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the body writes there is synced and renamed to `path`.

    If the body or the disk fails, the temporary file is removed and `path` is as it was. The body
    may read its file back and raise.

    Raises:
        DiskError: any failure of the file system (no space, quota, permission, ...).
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise DiskError(
            f"{_final(path)} could not be written ({error.strerror or error}); what was there "
            "before is untouched. Free some space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A path in the same folder for what is written until it may take the name of `path`.

    Raises:
        DiskError: `path` is "", "." or "/", which name no file.
    """
    if not path.name:
        raise DiskError(f"{str(path)!r} is a folder, not the name of a file; give one in it.")
    return path.with_name(f".{path.name[:120]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _final(path: Path) -> Path:
    """The path that a temporary one of `temporary_beside` is to become; any other as it is."""
    own = re.fullmatch(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp", path.name)
    return path.with_name(own[1]) if own else path


def explain_os_error(error: OSError) -> DiskError | None:
    """The one line of a write outside `replacing` for which there was no space, and of a path that
    no file can have or nobody may read; None for others.
    """
    if error.errno in _UNUSABLE and error.filename:
        return DiskError(
            f"{str(error.filename)[:80]} cannot be used ({error.strerror}); name another path."
        )
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return None
    what = error.filename or "a file"
    return DiskError(
        f"{what} could not be written ({error.strerror}); what was learned so far is whole. Free "
        "some space and run the same command again."
    )


def sync(path: Path) -> None:
    """fsync of a file or folder. Raises OSError."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its renames are journalled
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # some network file systems cannot sync folders
    finally:
        os.close(handle)


def remove_temporary_files(folder: str | Path) -> None:
    """Remove what a killed process left of `replacing` in `folder` (not in its subfolders)."""
    for file in Path(folder).glob(".*-????????.tmp"):
        with suppress(OSError):
            file.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises DiskError."""
    write_chunks(path, [data])


def write_json(path: str | Path, data: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, whole or not at all; without indent (for no reader) 10 times faster.

    Raises:
        DiskError: as `replacing`.
        NumericError: the value holds NaN or infinity, which JSON has no words for.
    """
    try:
        text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericError(f"{path} would hold NaN or infinity; it is not written.") from error
    write_bytes(path, (text + "\n").encode("utf-8"))


def write_chunks(path: str | Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all, piece by piece. Raises DiskError."""
    with replacing(path) as temporary, writing(temporary) as write:
        for chunk in chunks:
            write(chunk)


@contextmanager
def writing(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A new file, and what appends to it; the disk writes while the caller makes the next bytes.

    Raises:
        OSError: no space, ...; it may be told some bytes late, but never after the end.
    """
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        since = 0
        pending: list[Future[None]] = []  # the one that was asked for last

        def write(chunk: bytes | memoryview) -> None:
            nonlocal since
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE):
                file.write(view[start : start + _PIECE])
            since += len(view)
            if since >= _BEHIND and all(one.done() for one in pending):
                since = 0
                for one in pending:
                    one.result()
                pending[:] = [pool.submit(os.fsync, file.fileno())]

        yield write
        for one in pending:
            one.result()


# ---------------------------------------------------------------------------------------- JSON


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        FileFormatError: missing, unreadable or damaged.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path} is too large for a JSON file of ours.")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON ({first_line(error)}).") from error


def first_line(error: BaseException, longest: int = 120) -> str:
    """The first line of what an error says, short enough for a message; its name if it is mute."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]


# --------------------------------------------------------------------------------------- space


def require_free_space(folder: str | Path, bytes_needed: int, what: str) -> None:
    """Raises DiskError unless the file system of `folder` (which may not exist yet) has room."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise DiskError(
            f"{what} needs {bytes_needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder."
        )


def cache_folder() -> Path:
    """Where hashes and what else can be made again are kept: $LCP_CACHE or ~/.cache/lcp_plugin."""
    chosen = os.environ.get("LCP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "lcp_plugin"
