"""What image folders hold; `pictures` is imported when asked: no folder in a config, no Pillow."""

from __future__ import annotations

from pathlib import Path


def list_images(folder: Path) -> list[Path]:
    """Images directly in a folder (`pictures.list_images`)."""
    from lcp_plugin.formats import pictures

    return pictures.list_images(folder)


def describe_left_out(folder: Path) -> str:
    """One sentence on a folder's other files (`pictures.describe_left_out`)."""
    from lcp_plugin.formats import pictures

    return pictures.describe_left_out(folder)
