"""Write configs/OPTIONS.md, the page of all options, from the code. `--check` only compares.

python tools/options_page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.config.options_page import render_options_page

PAGE = Path(__file__).resolve().parents[1] / "configs" / "OPTIONS.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write")
    parser.add_argument("--check", action="store_true", help="fail if the file is not up to date")
    args = parser.parse_args(argv)
    page = render_options_page()
    if args.check:
        current = args.output.is_file() and args.output.read_text(encoding="utf-8") == page
        print(
            f"{args.output} is {'up to date' if current else 'outdated: run this without --check'}"
        )
        return 0 if current else 1
    args.output.write_text(page, encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
