"""The samples of a run as pictures of the page: by a name of our own, and from its folder alone.

A name is looked up among those that were listed, so no path that a browser sends is ever opened,
and a link that leads out of the run's folder is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lcp_plugin.evaluation.recognition import Look
from lcp_plugin.report.blocks import Gallery
from lcp_plugin.report.inline import SMALL, Embedded, peek, shrink_picture
from lcp_plugin.report.read import RunFacts, TaskFacts

TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def lies_inside(folder: Path, path: Path) -> bool:
    """Whether a path, its links followed, is in the folder (which is resolved)."""
    try:
        return path.resolve(strict=True).is_relative_to(folder)
    except (OSError, RuntimeError):
        return False


@dataclass(frozen=True)
class Picture:
    """One file as it was when the page last looked."""

    path: Path
    stamp: int  # when it was written, nanoseconds
    prompt: str
    small: bool


@dataclass(frozen=True)
class Image:
    """What a browser is answered."""

    data: bytes
    kind: str  # of image/...


class Album:
    """The pictures that the page may ask for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # resolved
        self._known: dict[str, Picture] = {}
        self._shrunk: dict[str, tuple[int, Image]] = {}

    def list_samples(self, run: RunFacts) -> None:
        """Takes in the samples that a run has by now; what lies elsewhere is left out."""
        found: dict[str, Picture] = {}
        for cells in run.samples.values():
            for path in (paths[0] for paths in cells.values()):
                name = path.relative_to(run.folder).as_posix()
                picture = self._take(self._known.get(name), path)
                if picture is not None:
                    found[name] = picture
        self._known = found

    def _take(self, known: Picture | None, path: Path) -> Picture | None:
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return None
        if known is not None and known.stamp == stamp:
            return known
        if not lies_inside(self._folder, path):
            return None
        prompt, side = peek(path)
        return Picture(path, stamp, prompt, side <= SMALL) if side else None

    def show(self, run: RunFacts, path: Path, alt: str) -> Embedded | None:
        """The picture for a template; None if it may not be shown."""
        name = path.relative_to(run.folder).as_posix()
        known = self._known.get(name)
        if known is None:
            return None
        address = f"{quote(name)}?{known.stamp}"  # a new picture of an old name is another address
        return Embedded(f"small/{address}", known.prompt or alt, known.small, f"whole/{address}")

    def fetch(self, name: str, whole: bool) -> Image | None:
        """A listed picture, in its own size or shrunk; None for every other name."""
        picture = self._known.get(name)
        if picture is None or not lies_inside(self._folder, picture.path):
            return None
        if whole:
            return self._read(picture.path)
        stamp, image = self._shrunk.get(name, (0, None))
        if image is None or stamp != picture.stamp:
            shrunk = shrink_picture(picture.path)
            if shrunk is None:
                return None
            image = Image(shrunk.data, shrunk.kind)
            self._shrunk[name] = picture.stamp, image
        return image

    @staticmethod
    def _read(path: Path) -> Image | None:
        kind = TYPES.get(path.suffix.lower())
        try:
            return Image(path.read_bytes(), kind) if kind else None
        except OSError:
            return None


def build_gallery(
    run: RunFacts, album: Album, looks: Mapping[str, Mapping[str, Look]]
) -> Gallery | None:
    """The sample grid as far as it has grown; None before the first picture.

    `looks`: stage folder -> task name -> what it looks like, where that was measured.
    """
    stages = sorted(run.samples)
    by_index = {int(stage.partition("_")[0]): found for stage, found in looks.items()}
    concepts = {task.name: task.concept for task in run.tasks}
    rows = []
    for task in run.tasks:
        cells = []
        for stage in stages:
            pictures = _pictures(run, album, task, stage)
            look = by_index.get(stage, {}).get(task.name) if stage > task.index else None
            lost = ""
            if look is not None and not look.is_recognised:
                lost = f"like {concepts.get(look.other or '', look.other or 'none of them')}"
            cells.append((pictures, lost if pictures else ""))
        if any(pictures for pictures, _ in cells):
            rows.append((task.concept, cells))
    columns = [f"after {stage}" if stage else "base" for stage in stages]
    return Gallery(columns, rows) if rows else None


def _pictures(run: RunFacts, album: Album, task: TaskFacts, stage: int) -> list[Embedded]:
    paths = run.samples[stage].get(task.name, ())[:1]
    when = f"after task {stage}" if stage else "by the base model"
    shown = (album.show(run, path, f"{task.concept}, {when}") for path in paths)
    return [picture for picture in shown if picture is not None]
