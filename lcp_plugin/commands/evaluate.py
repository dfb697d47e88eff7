"""Scores what a chain of tasks has learned and forgotten, or any two folders of images.

    lcp evaluate output/my_run --metrics clip_i dino effnet
    lcp evaluate output/run_a output/run_b --output comparison
    lcp evaluate --adapters 1.safetensors 2.safetensors --base BASE --tasks tasks.toml
    lcp evaluate --generated A --references B --metrics effnet --output scores

First comes what is still recognised, and what the rest became; then the tables. Images are made
once: an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lcp_plugin.commands.front import command, tell_progress
from lcp_plugin.evaluation import options


def build_parser() -> argparse.ArgumentParser:
    """What is scored, with what, how."""
    return options.build_parser(__doc__)


@command
def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit status."""
    args = build_parser().parse_args(argv)
    tell_progress()
    from lcp_plugin.evaluation.command import evaluate

    print(evaluate(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
