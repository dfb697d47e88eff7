"""What a folder of photos holds: one task for each of its folders, and what is left out.

dog/                  images: one task
10_sks dog/           kohya's name: every image counts ten times, a prompt calls it "sks dog"
dog/10_sks dog/ ...   folders of such names inside: together one task
watercolor/cat/ ...   folders of other names inside: one motif each, as a style has them
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lcp_plugin.data.captions import read_caption
from lcp_plugin.errors import DataError
from lcp_plugin.formats.pictures import describe_left_out, list_images, list_left_out, read_size
from lcp_plugin.telling.wording import counted, join_words
from lcp_plugin.watch.finding import is_run

CAPTION_ENDINGS = (".caption", ".txt")  # in the order in which the trainer looks for them
KOHYA_PARTS = {"img", "reg", "log", "model"}  # the folders that kohya_ss makes for a training
_REPEATS = re.compile(r"^(\d+)_(.+)$")
_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave behind without a dot
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Shelf:
    """A folder of images; `repeats` and `class_words` where its name is one of kohya's."""

    folder: Path
    images: tuple[Path, ...]
    repeats: int | None = None
    class_words: str = ""


@dataclass(frozen=True)
class Captions:
    """Texts beside images: their file ending, and how many images have none."""

    texts: tuple[str, ...] = ()
    ending: str = ""
    bare: int = 0


@dataclass(frozen=True)
class Photos:
    """A folder that becomes a task."""

    folder: Path
    shelves: tuple[Shelf, ...]
    has_motifs: bool = False  # each of its folders shows something else
    told: tuple[str, ...] = ()

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """All images, each once."""
        return tuple(image for shelf in self.shelves for image in shelf.images)

    @cached_property
    def words(self) -> str:
        """What the folder's name says, in lower case: "Fancy_Boot2" is "fancy boot"."""
        given = next((s.class_words for s in self.shelves if s.class_words), "")
        return split_name(given or self.folder.name)

    @cached_property
    def has_repeats(self) -> bool:
        """Whether a name of kohya's says how often images count."""
        return any(shelf.repeats is not None for shelf in self.shelves)

    @cached_property
    def captions(self) -> Captions:
        """The texts beside the images, as the trainer would read them. Raises DataError."""
        for ending in CAPTION_ENDINGS:
            files = [image.with_suffix(ending) for image in self.images]
            found = [file for file in files if file.is_file()]
            if found:
                texts = tuple(text for file in found if (text := read_caption(file)))
                return Captions(texts, ending, len(files) - len(texts))
        return Captions()

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each image, upright. Raises DataError."""
        return tuple(read_size(image) for image in self.images)


@dataclass(frozen=True)
class Survey:
    """The tasks-to-be in the order of their names, and what is left out."""

    root: Path
    tasks: tuple[Photos, ...]
    told: tuple[str, ...] = field(default=())


def survey(root: Path) -> Survey:
    """What becomes of `root`. Raises DataError where there is no image to learn from."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(
            f"{root} {what}; give a folder that holds a folder of photos for each task."
        )
    if is_run(root):
        raise DataError(
            f"{root} is a run's folder, it holds no photos; to learn more on top of it: "
            f"{join_words(['lcp', 'init', 'PHOTOS', '--prev', str(root)])}"
        )
    told: list[str] = []
    names = {folder.name for folder in list_folders(root)}
    if "img" in names and names <= KOHYA_PARTS:
        others = ", ".join(sorted(names - {"img"}))
        root = root / "img"
        told += [f"{others}: left out; images are taken from {root}"] if others else []
    tasks = []
    for folder in list_folders(root):
        found = look_into(folder)
        if found is None:
            reason = describe_left_out(folder) or "holds no images"
            told.append(f"{folder.name}: left out; {reason}")
        else:
            tasks.append(found)
    own = list_images(root)
    if own and tasks:
        told.append(
            f"{counted(len(own), 'image')} left out, which lie directly in {root}: a task's images "
            "are in a folder of its own"
        )
    elif own:
        tasks = [Photos(root, (Shelf(root, tuple(own)),))]
    told += describe_others(root)
    if not tasks:
        raise DataError(
            f"{root} holds no images in its folders; put the photos of each task into a folder of "
            f"its own, for example {root / 'my dog'}. {describe_left_out(root)}".strip()
        )
    return Survey(root, tuple(tasks), tuple(told))


def look_into(folder: Path) -> Photos | None:
    """A folder's images, or those of its folders; None without any."""
    inner = [path for path in list_folders(folder) if list_images(path)]
    told = describe_others(folder)
    images = list_images(folder)
    if images:
        told += [f"{folder.name}/{path.name}: left out; {folder.name} has images" for path in inner]
        return Photos(folder, (_shelf(folder, images),), told=tuple(told))
    if not inner:
        return None
    shelves = tuple(_shelf(path, list_images(path)) for path in inner)
    told += [line for path in inner for line in describe_others(path)]
    by_repeats = all(shelf.repeats is not None for shelf in shelves)
    if not by_repeats:  # the names are motifs then, numbered or not
        shelves = tuple(Shelf(shelf.folder, shelf.images) for shelf in shelves)
    return Photos(folder, shelves, has_motifs=not by_repeats, told=tuple(told))


def _shelf(folder: Path, images: Sequence[Path]) -> Shelf:
    match = _REPEATS.match(folder.name)
    if match and int(match[1]) > 0:
        return Shelf(folder, tuple(images), int(match[1]), match[2].strip())
    return Shelf(folder, tuple(images))


def list_folders(folder: Path) -> list[Path]:
    """Folders directly in a folder, by name; hidden ones are left out."""
    found = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path)]
    return sorted(found, key=lambda path: (path.name.casefold(), path.name))


def is_hidden(path: Path) -> bool:
    """Whether a system keeps a file to itself."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM


def describe_others(folder: Path) -> list[str]:
    """One line on a folder's hidden files, one on those that are no images; captions are known."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hidden = [path for path in files if is_hidden(path)]
    images = list_images(folder)
    stems = {image.stem for image in images}
    known = {*hidden, *images, *list_left_out(folder)}
    others = [path for path in files if path not in known and not _is_caption(path, stems)]
    lines = [describe_left_out(folder)]
    for noun, found in (("hidden file", hidden), ("file that is no image", others)):
        if found:
            nouns = noun.replace("file", "files").replace("that is no image", "that are no images")
            what = noun if len(found) == 1 else nouns
            names = ", ".join(path.name for path in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"{folder.name}: {len(found)} {what} left out ({names}{more})")
    return [line for line in lines if line]


def _is_caption(path: Path, stems: set[str]) -> bool:
    return path.suffix.lower() in CAPTION_ENDINGS and path.stem in stems


def split_name(name: str) -> str:
    """The words of a folder's or file's name, lower case, without numbers at its end."""
    spaced = re.sub(r"[_\-.\s]+", " ", _CAMEL.sub(" ", name)).strip().lower()
    return re.sub(r"\s*\d+$", "", spaced) or spaced


def walk_stems(photos: Photos) -> Iterator[str]:
    """The words of each image's file name."""
    return (split_name(image.stem) for image in photos.images)
