"""One process at a time in a run's folder, on every system.

POSIX has `fcntl.lockf`; filelock would take flock there, which data workers inherit: those that
outlive a killed run would hold its lock. Elsewhere (Windows) it is filelock's, which torch and
huggingface_hub bring along. Either lock dies with its process.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lcp_plugin.errors import DiskError

LOCK = ".lock"  # in a run's folder


@contextmanager
def locked(folder: Path, name: str, busy: str = "") -> Iterator[None]:
    """One process at a time in a run's folder; the lock dies with its process.

    Raises:
        DiskError: another process holds it; `busy` is what it says, if not of a training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder / LOCK)
    try:
        lock.__enter__()
    except OSError as error:
        raise DiskError(
            busy
            or f"run '{name}' is being trained by another process; wait for it, or choose "
            "another --output_name."
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _lock_of(file: Path) -> AbstractContextManager[object]:
    """What holds a file while it is entered; OSError where another process has it."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        from filelock import FileLock

        return FileLock(file, timeout=0)  # its Timeout is an OSError
    return _posix_lock(file)


@contextmanager
def _posix_lock(file: Path) -> Iterator[None]:
    import fcntl

    with file.open("wb") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_held(folder: Path) -> bool | None:
    """Whether a process works in a run's folder, asked without taking the lock (F_GETLK).

    None where the system cannot say. Not for a process that holds the lock itself: POSIX forgets a
    process's locks on a file as soon as it closes the file anywhere.
    """
    try:
        import fcntl
    except ImportError:
        return None
    # struct flock: Linux has type, whence, start, len, pid; the BSDs and macOS start, len, pid, ...
    layout, at = ("@hhqqi", 0) if sys.platform == "linux" else ("@qqihh", 3)
    asked = [0] * 5
    asked[at] = fcntl.F_RDLCK  # a lock for writing stands against it
    request = struct.pack(layout, *asked).ljust(64, b"\0")
    try:
        with (folder / LOCK).open("rb") as handle:
            answer = fcntl.fcntl(handle, fcntl.F_GETLK, request)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return int(struct.unpack_from(layout, answer)[at]) != fcntl.F_UNLCK
