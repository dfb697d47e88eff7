"""Writes report.html: one file, no network, for one run or for several side by side.

python tools/report.py output/my_run
python tools/report.py output/naive output/merge_init --scores comparison/scores.json

The sample grid of a scored run is drawn anew, with a cross on what is not recognised.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError
from lcp_plugin.report import write_report
from lcp_plugin.run.samples import mark_grid


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the paths of what was written; returns the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", description="One self-contained HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders")
    parser.add_argument("--scores", type=Path, help="scores.json of tools/evaluate.py")
    parser.add_argument("--output", type=Path, help="the file to write (RUN/report.html)")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            if (grid := mark_grid(run.resolve())) is not None:
                print(grid)
        print(write_report([run.resolve() for run in args.runs], args.scores, args.output))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install {error.name}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
