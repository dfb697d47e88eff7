"""Scores what a chain of tasks has learned and forgotten, or any two folders of images.

    python tools/evaluate.py output/my_run --metrics clip_i dino effnet
    python tools/evaluate.py output/run_a output/run_b --output comparison
    python tools/evaluate.py --adapters 1.safetensors 2.safetensors --base BASE --tasks tasks.toml
    python tools/evaluate.py --generated A --references B --metrics effnet --output scores

First comes what is still recognised, and what the rest became; then the tables. Images are made
once: an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcp_plugin").setLevel(logging.INFO)
    from lcp_plugin.evaluation.command import run_command

    try:
        print(run_command(sys.argv[1:] if argv is None else argv))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
