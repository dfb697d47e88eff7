"""A folder that is written whole: under another name until it is done, then it takes its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcp_plugin.errors import DiskError
from lcp_plugin.formats.disk import sync, write_json

MARKER = "lcp_export.json"  # in a folder that we wrote and may replace


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the body is done.

    Raises:
        DiskError: `folder` exists, is not empty and no export of ours, or the file system failed.
    """
    ours = (folder / MARKER).is_file()  # an earlier export of ours may be replaced
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise DiskError(f"{folder} exists and is not empty; choose another name or remove it.")
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        write_json(temporary / MARKER, {"made_by": "lcp_plugin export"})
        for file in temporary.rglob("*"):
            sync(file)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        temporary.replace(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DiskError(
            f"{folder} could not be written ({error.strerror or error}); free some space or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
