"""A run's process: stopping behind a step when asked to, starting fast."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


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
