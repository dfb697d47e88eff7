"""The command lines of tools/compare.py and tools/sweep.py: train, score, report."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcp_plugin.config.load import load_config
from lcp_plugin.evaluation.chains import CEILINGS, read_chain
from lcp_plugin.evaluation.command import count, evaluate_chains
from lcp_plugin.evaluation.conflicts import compare_boundaries, figure_two, open_boundaries
from lcp_plugin.evaluation.inputs import fill_references, read_tasks
from lcp_plugin.formats.disk import write_json
from lcp_plugin.report import write_report
from lcp_plugin.sweep.plan import list_lanes, plan_runs
from lcp_plugin.sweep.running import create_executor, execute_plan


def add_sweep_options(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """What is run: strategies, ceilings, orders, seeds, where."""
    group = parser.add_argument_group("runs")
    group.add_argument("--config", type=Path, required="config" not in defaults, help="run's TOML")
    group.add_argument("--strategies", nargs="+", help="what is compared; the first one leads")
    group.add_argument("--ceilings", nargs="*", choices=CEILINGS, help="bounds to run as well")
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
        help="runs at a time here, and processes that make images, each on its share of the cores "
        "(the CPU's cores, at most 4; 1 with a GPU)",
    )
    group.add_argument(
        "--no_conflicts", action="store_true", help="leave out Figure 2 (tools/conflicts.py)"
    )
    group.add_argument("--plan", action="store_true", help="print the runs and stop")
    parser.set_defaults(**{"samples_of_config": False, **defaults})


def _order(text: str) -> int | None:
    return None if text == "file" else int(text)


def run_sweep(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Runs what the options describe, scores it, and writes tables and one report; its summary.

    Unknown options go to every run's training command.
    """
    args, extra = parser.parse_known_args(argv)
    plan = plan_runs(
        args.config,
        args.strategies,
        args.ceilings,
        list_lanes(args.orders, args.seeds),
        args.output.resolve() / "runs",
        extra,
    )
    if args.plan:
        return "\n".join(" ".join(run.arguments) for run in plan.runs)
    tasks = {task.name: task for task in read_tasks(args.config, args.references, extra)}
    if args.samples_of_config:
        sample_as_configured(args, extra)
    began = time.monotonic()
    executor = create_executor(args.executor, args.output.resolve() / "jobs", args.job)
    parallel = args.parallel or choose_parallel()
    execute_plan(plan, executor, parallel)
    trained = time.monotonic() - began
    chains = [
        fill_references(read_chain(run.store.root, args.references), tasks) for run in plan.runs
    ]
    text = evaluate_chains(chains, args, args.output, parallel)
    for chain in chains:
        if not chain.is_ceiling and not args.no_conflicts:
            save_conflicts(Path(chain.path))
    scored = time.monotonic() - began - trained
    report = write_report(
        [Path(c.path) for c in chains if not c.is_ceiling],
        args.output / "scores.json",
        args.output / "report.html",
    )
    return (
        f"{text}\ntraining {trained:.0f} s, scoring {scored:.0f} s\n"
        f"scores   {args.output / 'scores.json'}\nreport   {report}"
    )


def sample_as_configured(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Steps and guidance that are given neither as options nor by a protocol become the config's
    `sample_steps` and `guidance_scale`, as in a run's own closing scores."""
    if args.protocol is not None:
        return
    options = load_config(["--config", str(args.config), *flags]).options
    args.steps = options.sample_steps if args.steps is None else args.steps
    args.guidance = options.guidance_scale if args.guidance is None else args.guidance


def save_conflicts(run: Path) -> None:
    """conflicts.json of a run's folder, where the report finds Figure 2; once."""
    file, newest = run / "conflicts.json", max(run.glob("*/lineage.json"), key=os.path.getmtime)
    if file.is_file() and file.stat().st_mtime >= newest.stat().st_mtime:
        return
    with open_boundaries(run.absolute()) as (names, at, modules):
        pairs = compare_boundaries(names, at, modules)
    facts = {"after": figure_two(names, pairs), "pairs": [pair.to_json() for pair in pairs]}
    write_json(file, facts)


def choose_parallel() -> int:
    """Runs at a time: one on a GPU; small models on a CPU train best with one core each."""
    from lcp_plugin.sdxl.devices import choose_device

    return min(4, os.cpu_count() or 1) if choose_device() == "cpu" else 1
