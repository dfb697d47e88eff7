"""One process at a time in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    with (folder / LOCK).open("w") as handle:
        try:
            import fcntl

            # lockf, not flock: data workers that outlive a killed run must not hold its lock
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no fcntl; two runs of one name are then the user's care
            pass
        except OSError as error:
            raise DiskError(
                busy
                or f"run '{name}' is being trained by another process; wait for it, or choose "
                "another --output_name."
            ) from error
        yield
