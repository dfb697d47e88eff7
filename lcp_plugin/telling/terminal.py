"""Whether people look at a stream, and how it may be drawn on.

A stream is a terminal if it says so and TERM is not "dumb"; anything else (a pipe, a log file)
gets plain lines. Colours only on a terminal, and never where NO_COLOR is set (no-color.org).
"""

from __future__ import annotations

import os
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    """Whether bars and redrawn lines make sense there."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def shows_colour(stream: TextIO) -> bool:
    """Whether colours may be used there."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
