"""What image folders hold, asked of `pictures` when it is asked: a config without one loads no
Pillow.
"""

from __future__ import annotations

from pathlib import Path


def list_images(folder: Path) -> list[Path]:
    """As `pictures.list_images`."""
    from lcp_plugin.formats import pictures

    return pictures.list_images(folder)


def describe_left_out(folder: Path) -> str:
    """As `pictures.describe_left_out`."""
    from lcp_plugin.formats import pictures

    return pictures.describe_left_out(folder)
