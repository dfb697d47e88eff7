"""Whether a run lives. Its lock says so: it dies with its process, so a run that is neither
finished nor locked has ended before its time. How, its log says in its last line, or not at all.

Where a system cannot tell who holds a lock, files that stay quiet for long stand for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcp_plugin.store.lock import LOCK, is_held
from lcp_plugin.watch.log import Facts

QUIET = 600.0  # seconds without a word after which a run without a readable lock counts as dead
STOPPED = ("Interrupted", "KeyboardInterrupt")  # by a signal, the state saved

State = Literal["starting", "running", "closing", "finished", "stopped", "failed", "died"]
WORDS: dict[State, str] = {
    "starting": "starting",
    "running": "running",
    "closing": "finished, scores and report under way",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "ended by an error",
    "died": "died",
}


@dataclass(frozen=True)
class Life:
    """What a run does, and why it does not go on."""

    state: State
    error: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether a process works on it."""
        return self.state in ("starting", "running", "closing")

    @property
    def is_broken_off(self) -> bool:
        """Whether something is left to do and nobody does it."""
        return self.state in ("stopped", "failed", "died")


def examine(folder: Path, run: Facts, last: Facts) -> Life:
    """A run's life, from its folder, its run.json and the last line of its log."""
    held = is_held(folder)
    if held is None:
        held = _is_heard_of(folder)
    if run.get("status") == "finished":
        is_scored_now = is_held(folder / "evaluation")  # it has a lock of its own
        return Life("closing" if held or is_scored_now else "finished")
    if held:
        heard = _changed(folder / "logs" / "steps.jsonl") >= _changed(folder / LOCK)
        return Life("running" if run and heard else "starting")
    if last.get("event") != "error":
        return Life("died")
    name, message = str(last.get("error", "")), str(last.get("message", ""))
    if name in STOPPED:
        return Life("stopped")
    return Life("failed", f"{name}: {message}" if message else name)


def _is_heard_of(folder: Path) -> bool:
    places: Iterable[Path] = (folder / "run.json", *folder.glob("logs/*"), *folder.glob("state/*"))
    return time.time() - max(map(_changed, places), default=0.0) < QUIET


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
