"""The run that is meant: its folder, or an error that names the runs nearby."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lcp_plugin.errors import RunFolderError
from lcp_plugin.store.lock import LOCK

NAMED = 6  # runs in a message


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, one that only begins included."""
    marks = (folder / "run.json", folder / LOCK)
    return any(mark.is_file() for mark in marks) or any(folder.glob("[0-9]*_*/lineage.json"))


def find_run(folder: Path) -> Path:
    """The run's folder, resolved.

    Raises:
        RunFolderError: it is none; the message names those nearby, the newest first.
    """
    if folder.is_dir() and is_run(folder):
        return folder.resolve()
    what = "is not a run's folder" if folder.exists() else "is not there"
    found = sorted(set(_runs_nearby(folder)), key=_age, reverse=True)[:NAMED]
    hint = "no run is near it; give the folder <output_dir>/<output_name> of one."
    if found:
        hint = f"runs nearby, the newest first: {', '.join(str(run) for run in found)}."
    raise RunFolderError(f"{folder} {what}; {hint}")


def _runs_nearby(folder: Path) -> Iterator[Path]:
    for place in (folder, folder.parent, Path("output"), Path(".")):
        if place.is_dir():
            yield from (run for run in _subfolders(place) if is_run(run))


def _subfolders(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if path.is_dir()]
    except OSError:
        return []


def _age(run: Path) -> float:
    try:
        return max(run.stat().st_mtime, (run / LOCK).stat().st_mtime)
    except OSError:
        return 0.0
