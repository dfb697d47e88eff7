"""Writes report.html: one file, no network, for one run or for several side by side.

    lcp report output/my_run
    lcp report output/naive output/merge_init --scores comparison/scores.json

The sample grid of a scored run is drawn anew, with a cross on what is not recognised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """Whose page, with which scores, where."""
    parser = Parser("report", __doc__, "RUN ...")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders")
    parser.add_argument("--scores", type=Path, help="scores.json of lcp evaluate")
    parser.add_argument("--output", type=Path, help="the file to write (RUN/report.html)")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the paths of what was written; returns the exit status."""
    args = build_parser().parse_args(argv)
    from lcp_plugin.report import write_report
    from lcp_plugin.run.samples import mark_grid

    for run in args.runs:
        if (grid := mark_grid(run.resolve())) is not None:
            print(grid)
    print(write_report([run.resolve() for run in args.runs], args.scores, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
