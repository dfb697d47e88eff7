"""Recall and the paper's four strategies on the same tasks, sharing the first one, in one table.

    lcp compare --dry_run                        # what it would do, and about how long
    lcp compare                                  # the quickstart's config, two seeds
    lcp compare --config my.toml --seeds 0 1 2 --output comparison

The base row and the ceilings `independent` and `joint` are in the table; every run, its scores and
one report.html are in --output. Unless given: 2 prompts, 4 images, the config's sample_steps and
guidance_scale. Stopped and started again, it goes on. Options that this command does not know go to
the training command: --max_train_steps 200.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.commands.sweep import print_tables
from lcp_plugin.config.parser import Parser
from lcp_plugin.evaluation.options import add_scoring_options
from lcp_plugin.sweep.options import add_sweep_options

DEFAULTS = {
    "config": Path("quickstart.toml"),
    "strategies": ["recall", "naive", "merge_init", "merge_ortho_init", "magmax"],
    "ceilings": ["independent", "joint"],
    "orders": [None],
    "seeds": [0, 1],
    "output": Path("comparison"),
    "prompts": 2,
    "images": 4,
    "samples_of_config": True,
}


def build_parser() -> argparse.ArgumentParser:
    """What a sweep takes, with the comparison's defaults."""
    parser = Parser("compare", __doc__)
    add_sweep_options(parser, DEFAULTS)
    add_scoring_options(parser)
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    return print_tables(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
