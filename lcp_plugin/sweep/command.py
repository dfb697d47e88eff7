"""What `lcp compare` and `lcp sweep` do: train, score, report."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.config.load import load_config
from lcp_plugin.evaluation.cards import visible_cards
from lcp_plugin.evaluation.chains import EvalTask, read_chain
from lcp_plugin.evaluation.command import choose_protocol, evaluate_chains
from lcp_plugin.evaluation.conflicts import compare_boundaries, figure_two, open_boundaries
from lcp_plugin.evaluation.inputs import fill_references, read_config, read_tasks
from lcp_plugin.formats.disk import write_json
from lcp_plugin.report import write_report
from lcp_plugin.sweep.hours import Drawing, count_work, describe_work, sum_up
from lcp_plugin.sweep.plan import SweepPlan, list_lanes, plan_runs
from lcp_plugin.sweep.running import create_executor, execute_plan

logger = logging.getLogger(__name__)


def run_sweep(args: argparse.Namespace, extra: Sequence[str]) -> str:
    """Runs what the options describe, scores it, and writes tables and one report; its summary.

    `extra` are further options of every run's training command.
    """
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
    tasks = {t.name: t for t in read_tasks(read_config(args.config, extra), args.references)}
    if args.samples_of_config:
        sample_as_configured(args, extra)
    drawing, parallel = plan_drawing(list(tasks.values()), args), choose_parallel(args)
    if args.dry_run:
        return describe_work(plan, drawing, args.seconds_per_step, parallel)
    tell_beginning(plan, drawing, args, parallel)
    began = time.monotonic()
    executor = create_executor(args.executor, args.output.resolve() / "jobs", args.job)
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


def plan_drawing(tasks: Sequence[EvalTask], args: argparse.Namespace) -> Drawing:
    """How many images of a task, on the mean, and how they are drawn."""
    protocol = choose_protocol(args)
    sampling = protocol.sampling
    prompts = [len(protocol.apply(task).prompts) for task in tasks]
    images = round(sampling.images * sum(prompts) / max(1, len(prompts)))
    return Drawing(images, sampling.steps, sampling.size)


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


def tell_beginning(
    plan: SweepPlan, drawing: Drawing, args: argparse.Namespace, parallel: int
) -> None:
    """What will be done and about how long it takes, before the first run starts."""
    work = count_work(plan, drawing, args.seconds_per_step)
    for line in sum_up(plan, work, parallel, args.seconds_per_step):
        logger.info("%s", line)
    if work:
        logger.info("all of it in %s; stopped, the same command goes on", args.output)


def choose_parallel(args: argparse.Namespace) -> int:
    """Runs at a time, unless they are given: one on each card; small models on a CPU train best
    with one core each. Jobs of a cluster share no machine.
    """
    from lcp_plugin.sdxl.devices import choose_device, count_processes

    if args.parallel or args.executor == "slurm":
        return int(args.parallel or 1)
    return len(visible_cards()) or (count_processes() if choose_device() == "cpu" else 1)
