"""Prints what this machine has and which preset fits on its GPU.

python tools/doctor.py
python tools/doctor.py --output_dir /data/runs --network_dim 64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Where a run would write, and its rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output"))
    parser.add_argument("--network_dim", type=int, default=32, help="rank (32)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    arguments = parse_arguments(argv)
    if arguments.network_dim < 1:
        print(f"error: --network_dim {arguments.network_dim}: at least 1.", file=sys.stderr)
        return 2
    from lcp_plugin.doctor import describe

    try:
        print(describe(arguments.output_dir, arguments.network_dim))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
