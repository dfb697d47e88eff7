"""`lcp watch RUN`: a page on this machine that shows a run while it goes on, or how it ended."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser

DESCRIPTION = """A local page that shows a run while it goes on: task, step, time left, losses,
memory, the sample grid as it grows and, once it is scored, what is still recognised. It works on a
finished run and on one that has died, and gives the command that goes on. It only reads, takes no
lock and loads nothing from elsewhere; Ctrl-C ends it.

From another machine: ssh -L 8000:127.0.0.1:PORT HOST, then open http://127.0.0.1:8000.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser("watch", DESCRIPTION, "RUN")
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the run's folder: <output_dir>/<output_name>"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of 127.0.0.1; default: a free one, which is printed"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C; returns the exit status."""
    args = build_parser().parse_args(argv)
    return serve(args.run, args.port, args.open)


def serve(run: Path, port: int, opens: bool) -> int:
    """Prints the page's address and serves it until Ctrl-C.

    Raises:
        DataError: RUN is no run's folder.  DiskError: the port cannot be had.
    """
    from lcp_plugin.watch.finding import find_run
    from lcp_plugin.watch.server import Server

    with Server(find_run(run), port) as server:
        print(f"{run.name}: {server.address}  (Ctrl-C ends)", flush=True)
        if opens:
            webbrowser.open(server.address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # behind the terminal's ^C
    return 0
