"""Templates, style and scripts that the report and the page of `lcp watch` share.

A template escapes every text; only charts, the style and our own scripts pass as they are. A script
is allowed by its hash (https://www.w3.org/TR/CSP3/#match-element-to-source-list).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

HERE = Path(__file__).resolve().parent
STYLE, SCRIPT = HERE / "style.css", HERE / "script.js"


@cache
def open_templates(*folders: Path) -> Environment:
    """The templates of these folders, and those of the report; compiled once in a process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def read_whole(*files: Path) -> Markup:
    """The files' text, one after another, as it stands."""
    from markupsafe import Markup

    return Markup("\n").join(Markup(file.read_text("utf-8")) for file in files)


def hash_scripts(scripts: Sequence[str]) -> Markup:
    """What a content security policy calls them: `'sha256-...' 'sha256-...'`."""
    from markupsafe import Markup

    digests = [hashlib.sha256(script.encode("utf-8")).digest() for script in scripts]
    return Markup(" ").join(
        Markup("'sha256-{}'").format(base64.b64encode(digest).decode("ascii")) for digest in digests
    )
