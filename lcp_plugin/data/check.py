"""Every image is decoded once before a model is loaded: a broken file is found in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.examples import collect_examples
from lcp_plugin.errors import DataError

SOME_SIZE = (1024, 1024)  # placements do not matter here


def check_images(tasks: Iterable[TaskConfig]) -> None:
    """Raises DataError naming the images that cannot be decoded (five at most)."""
    paths = {
        example.path
        for task in tasks
        for dataset in task.datasets
        for example in collect_examples(dataset, SOME_SIZE, "train", 0).examples
    }
    with ThreadPoolExecutor(max_workers=8) as pool:
        problems = [p for p in pool.map(_find_problem, sorted(paths)) if p is not None]
    if problems:
        raise DataError(_describe(problems))


def _find_problem(path: Path) -> str | None:
    """Why an image cannot be decoded; JPEGs are decoded at an eighth of their size."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (64, 64))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0]
        return f"{path} ({reason.replace(str(path), 'file')})"
    return None


def _describe(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"image cannot be read: {', '.join(problems[:5])}{more}; replace or remove "
        f"{'it' if len(problems) == 1 else 'them'}."
    )
