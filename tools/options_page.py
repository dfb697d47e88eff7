"""Write configs/OPTIONS.md, the page of all options, from the code. `--check` only compares.

python tools/options_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pages import write_page

from lcp_plugin.config.options_page import render_options_page

PAGE = Path(__file__).resolve().parents[1] / "configs" / "OPTIONS.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return write_page(argv, __doc__, PAGE, render_options_page)


if __name__ == "__main__":
    sys.exit(main())
