"""Prints what this machine has and which preset fits on its GPU, or measures it.

    lcp doctor
    lcp doctor --output_dir /data/runs --network_dim 64
    lcp doctor --report output/mine         for an issue: machine, versions and that run's facts,
                                            without paths, names, prompts or captions
    lcp doctor --measure                    every preset, on SDXL with random weights
    lcp doctor --measure --limit 8GB        as on a card with that much memory
    lcp doctor --measure --tasks 10 --json measured.json --strategy magmax

With --measure, options that this command does not know go to the training command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser
from lcp_plugin.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """Where a run would write, its rank, and what is measured."""
    parser = Parser("doctor", __doc__, abbreviations=False)
    parser.add_argument("--output_dir", type=Path, default=Path("output"))
    parser.add_argument("--network_dim", type=int, help="rank (32; with --measure paper's is 64)")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=True,
        metavar="RUN",
        help="print what an issue needs, of a run's folder too; paths and names made anonymous",
    )
    group = parser.add_argument_group("measuring")
    group.add_argument("--measure", action="store_true", help="train and sample under each preset")
    group.add_argument("--presets", nargs="+", choices=("8gb", "12gb", "24gb", "paper"))
    group.add_argument("--limit", metavar="SIZE", help="GPU memory that PyTorch may hold, like 8GB")
    group.add_argument("--tasks", type=int, default=1, metavar="N", help="measure task N too (1)")
    group.add_argument(
        "--size", choices=("tiny", "topo", "sdxl"), help="of the base (sdxl on a GPU, else tiny)"
    )
    group.add_argument("--side", type=int, help="pixels per side (the base's own: 1024 for sdxl)")
    group.add_argument("--steps", type=int, default=10, help="steps that are timed (10)")
    group.add_argument("--sample_steps", type=int, default=20, help="of the image (20)")
    group.add_argument("--json", type=Path, metavar="FILE", help="rows, written as they come")
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Checked arguments, and further options of the training command."""
    arguments, more = build_parser().parse_known_args(argv)
    for name, least in (("network_dim", 1), ("tasks", 1), ("steps", 2), ("sample_steps", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}.")
    if more and not arguments.measure:
        raise ConfigError(f"{more[0]}: options of a run are looked at with --measure only.")
    return arguments, more


def measure(arguments: argparse.Namespace, flags: Sequence[str]) -> tuple[str, int]:
    """The table of what was measured, and the exit status: 1 where something went wrong."""
    import torch

    from lcp_plugin.doctor.measure_report import format_rows, measure_presets, parse_limit
    from lcp_plugin.doctor.measuring import FAILED, SIZES, Request

    size = arguments.size or ("sdxl" if torch.cuda.is_available() else "tiny")
    request = Request(
        preset="",
        size=size,
        side=arguments.side or SIZES[size].resolution,
        rank=arguments.network_dim,
        steps=arguments.steps,
        sample_steps=arguments.sample_steps,
        tasks=arguments.tasks,
        limit=parse_limit(arguments.limit),
        flags=tuple(flags),
    )

    def tell(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    rows = measure_presets(request, arguments.presets or (), arguments.json, tell)
    return format_rows(rows, request), int(any(row["status"] == FAILED for row in rows))


@command
def main(argv: Sequence[str]) -> int:
    """Prints the report; returns the exit status."""
    arguments, flags = parse_arguments(argv)
    if arguments.measure:
        table, status = measure(arguments, flags)
        print(table)
        return status
    if arguments.report:
        from lcp_plugin.doctor.issue_report import describe_for_issue

        run = None if arguments.report is True else arguments.report
        print(describe_for_issue(run, arguments.output_dir, arguments.network_dim or 32))
        return 0
    from lcp_plugin.doctor.machine import describe_machine

    print(describe_machine(arguments.output_dir, arguments.network_dim or 32))
    return 0


if __name__ == "__main__":
    sys.exit(main())
