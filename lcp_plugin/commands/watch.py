"""Shows a run while it goes on, on a page of this machine: step, time left, losses, samples.

    lcp watch output/my_run
    lcp watch output/my_run --open

It works on a finished run too, and on one that has died, whose command to go on it gives. It only
reads, takes no lock, loads nothing from elsewhere and is served on 127.0.0.1 alone. Ctrl-C ends it.
For a run on another machine: ssh -L 8000:127.0.0.1:PORT HOST, and open http://127.0.0.1:8000 here.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """Which run, on which port."""
    parser = Parser("watch", __doc__, "RUN")
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the run's folder: <output_dir>/<output_name>"
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one, printed")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the page's address and serves it until Ctrl-C; returns the exit status."""
    args = build_parser().parse_args(argv)
    from lcp_plugin.watch.finding import find_run
    from lcp_plugin.watch.server import Server

    with Server(find_run(args.run), args.port) as server:
        try:
            print(f"{args.run.name}: {server.address}  (Ctrl-C ends)", flush=True)
            if args.open:
                webbrowser.open(server.address)
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # behind the terminal's ^C
    return 0


if __name__ == "__main__":
    sys.exit(main())
