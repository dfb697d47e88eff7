"""One process at a time in a run's folder, on every system.

POSIX has `fcntl.lockf`; filelock would take flock there, which data workers inherit: those that
outlive a killed run would hold its lock. Elsewhere (Windows) it is filelock's, which torch and
huggingface_hub bring along. Either lock dies with its process.
"""

from __future__ import annotations

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
