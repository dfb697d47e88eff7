"""Prints the options of training, all of them or those that a word is in, by theme.

    lcp options
    lcp options snr
    lcp options text encoder             both words, in a name, a theme or a description
    lcp options --differing              what is new here, or not as in kohya's trainer

configs/OPTIONS.md of the repository is the same as a page.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from lcp_plugin.commands.front import command
from lcp_plugin.config.option_text import list_options
from lcp_plugin.config.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """Which options are printed."""
    parser = Parser("options", __doc__, "[WORD ...]")
    parser.add_argument("words", nargs="*", metavar="WORD", help="all of them must be found")
    parser.add_argument(
        "--differing", action="store_true", help="only what is new, or differs from kohya's"
    )
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the options; returns the exit status."""
    args = build_parser().parse_args(argv)
    width = min(shutil.get_terminal_size((100, 40)).columns, 100)
    print(list_options(args.words, args.differing, width))
    return 0


if __name__ == "__main__":
    sys.exit(main())
