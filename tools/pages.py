"""A page that is written from the code, and a check that it is up to date."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def write_page(
    argv: Sequence[str] | None, about: str | None, page: Path, render: Callable[[], str]
) -> int:
    """The command line of such a page, `--output` and `--check`; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=page, help="file to write")
    parser.add_argument("--check", action="store_true", help="fail if the file is not up to date")
    args = parser.parse_args(argv)
    text = render()
    if args.check:
        current = args.output.is_file() and args.output.read_text(encoding="utf-8") == text
        state = "up to date" if current else "outdated: run this without --check"
        print(f"{args.output} is {state}")
        return 0 if current else 1
    args.output.write_text(text, encoding="utf-8")
    print(f"wrote {args.output}")
    return 0
