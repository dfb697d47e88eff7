"""Images inside the page: shrunk, and written as data URIs, so that the report is one file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lcp_plugin.errors import DataError
from lcp_plugin.formats.pictures import open_rgb

SIDE = 320  # pixels; larger pictures are shrunk to it
SMALL = 128  # pictures below this are shown with their pixels


@dataclass(frozen=True)
class Embedded:
    """One picture of the page."""

    uri: str
    alt: str
    small: bool
    whole: str = ""  # address of the picture in its own size, where there is one


@dataclass(frozen=True)
class Shrunk:
    """A picture as a page shows it."""

    data: bytes
    kind: str  # png, jpeg
    small: bool


def embed_picture(path: Path, alt: str, side: int = SIDE) -> Embedded | None:
    """A data URI of the picture, upright, at most `side` pixels wide; None if it is unreadable.

    The alternative text is the prompt in the picture's metadata where there is one.
    """
    (prompt, _), shrunk = peek(path), shrink_picture(path, side)
    if shrunk is None:
        return None
    data = base64.b64encode(shrunk.data).decode("ascii")
    return Embedded(f"data:image/{shrunk.kind};base64,{data}", prompt or alt, shrunk.small)


def peek(path: Path) -> tuple[str, int]:
    """The prompt in a picture's metadata, and its longer side in pixels; ("", 0) if unreadable."""
    try:
        with Image.open(path) as image:
            return str(getattr(image, "text", {}).get("prompt") or ""), max(image.size)
    except (OSError, ValueError, SyntaxError):
        return "", 0


def shrink_picture(path: Path, side: int = SIDE) -> Shrunk | None:
    """The picture, upright, at most `side` pixels wide; None if it is unreadable."""
    try:
        upright = open_rgb(path)
    except (OSError, ValueError, SyntaxError, DataError):
        return None
    small = max(upright.size) <= SMALL
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if small:
        upright.save(out, format="PNG", optimize=True)
    else:
        upright.save(out, format="JPEG", quality=84)
    return Shrunk(out.getvalue(), "png" if small else "jpeg", small)
