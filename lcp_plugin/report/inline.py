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


def embed_picture(path: Path, alt: str, side: int = SIDE) -> Embedded | None:
    """A data URI of the picture, upright, at most `side` pixels wide; None if it is unreadable.

    The alternative text is the prompt in the picture's metadata where there is one.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
            alt = str(text.get("prompt") or alt)
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
    kind = "png" if small else "jpeg"
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return Embedded(f"data:image/{kind};base64,{data}", alt, small)
