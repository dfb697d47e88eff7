"""The options of `lcp compare` and `lcp sweep`; no model is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lcp_plugin.config.parser import count


def add_sweep_options(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """What is run: strategies, ceilings, orders, seeds, where."""
    group = parser.add_argument_group("runs")
    group.add_argument("--config", type=Path, required="config" not in defaults, help="run's TOML")
    group.add_argument(
        "--strategies",
        nargs="+",
        help="what is compared, with arguments in quotes ('recall of=merge_init'); the first leads",
    )
    group.add_argument(
        "--ceilings",
        nargs="*",
        metavar="NAME",
        help="bounds to run as well: independent, joint, merge_at_end",
    )
    group.add_argument(
        "--orders", nargs="+", type=_order, help="order seeds; `file` keeps the config's order"
    )
    group.add_argument("--seeds", nargs="+", type=int, help="training seeds")
    group.add_argument("--output", type=Path, help="folder of runs and scores")
    group.add_argument(
        "--references", type=Path, help="one folder of images per task name (the training images)"
    )
    group.add_argument("--executor", choices=("here", "local", "slurm"), default="here")
    group.add_argument(
        "--job", nargs="*", default=[], metavar="KEY=VALUE", help="parameters of submitit's jobs"
    )
    group.add_argument(
        "--parallel",
        "--jobs",
        type=count,
        metavar="N",
        help="runs at a time here, and processes that make images, each on its share of the cores; "
        "where there are several cards each run has its own (as many as there are cards; without "
        "one the CPU's cores, at most 4)",
    )
    group.add_argument(
        "--no_conflicts", action="store_true", help="leave out Figure 2 (lcp conflicts)"
    )
    group.add_argument("--plan", action="store_true", help="print the runs and stop")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="print runs, steps, images and about how long, and stop",
    )
    group.add_argument(
        "--seconds_per_step",
        type=float,
        metavar="S",
        help="of the training, for --dry_run (what `lcp doctor --measure` found, or an estimate)",
    )
    parser.set_defaults(**{"samples_of_config": False, **defaults})


def _order(text: str) -> int | None:
    return None if text == "file" else int(text)
