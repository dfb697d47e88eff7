"""A run's process: alone in its folder, stopping behind a step when asked to, starting fast."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcp_plugin.errors import DiskError

log = logging.getLogger(__name__)

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


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to save its state and stop; a second SIGINT stops at once."""

    def request(number: int, frame: Any) -> None:
        if stop.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.set()
        log.warning("stopping behind this step (Ctrl-C to stop at once) ...")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def without_collecting() -> Iterator[None]:
    """No garbage collection inside, and none of what was made there until `thawing` ends: modules
    and models stay, and looking through them again and again costs a tenth of a small start-up.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


@contextmanager
def thawing() -> Iterator[None]:
    """Gives back to garbage collection, in the end, what `without_collecting` took from it."""
    try:
        yield
    finally:
        gc.unfreeze()
