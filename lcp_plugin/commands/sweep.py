"""Strategies x orders x seeds, here or on a cluster: one command from nothing to the tables.

    lcp sweep --config configs/objects.toml --orders 0 5 10 42 --seeds 0 5 \\
        --metrics clip_i dino --output sweep
    lcp sweep ... --dry_run            # what it would do, and about how long
    lcp sweep ... --executor slurm --job slurm_partition=gpu

A machine with several GPUs has a run on each (of CUDA_VISIBLE_DEVICES, where that is set), a job on
Slurm asks for one. Runs of one order and seed share their first task. Finished runs are left alone,
unfinished ones resumed. Options that this command does not know go to the training command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command, tell_progress
from lcp_plugin.config.parser import Parser
from lcp_plugin.evaluation.options import add_scoring_options
from lcp_plugin.sweep.options import add_sweep_options

DEFAULTS = {
    "strategies": ["naive", "merge_init", "merge_ortho_init", "magmax"],
    "ceilings": [],
    "orders": [0, 5, 10, 42],
    "seeds": [0, 5],
    "output": Path("sweep"),
}


def build_parser() -> argparse.ArgumentParser:
    """What is run, and how it is scored."""
    parser = Parser("sweep", __doc__, "--config FILE")
    add_sweep_options(parser, DEFAULTS)
    add_scoring_options(parser)
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit status."""
    return print_tables(build_parser(), argv)


def print_tables(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Runs what the options say; those that the parser does not know go to the training command."""
    args, more = parser.parse_known_args(argv)
    tell_progress()
    from lcp_plugin.sweep.command import run_sweep

    print(run_sweep(args, more))
    return 0


if __name__ == "__main__":
    sys.exit(main())
