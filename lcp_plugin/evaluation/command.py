"""The command line of tools/evaluate.py, and what compare.py and sweep.py share of it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.chains import (
    CEILINGS,
    Chain,
    EvalTask,
    chain_of_adapters,
    read_chain,
)
from lcp_plugin.evaluation.embeddings import EmbeddingCache
from lcp_plugin.evaluation.encoders import (
    METRICS,
    choose_metrics,
    load_encoder,
    parse_encoder_paths,
)
from lcp_plugin.evaluation.evaluate import (
    DTYPES,
    Evaluation,
    collect_scores,
    score_folders,
    tell_differences,
    write_scores,
)
from lcp_plugin.evaluation.images import SUFFIXES, list_images
from lcp_plugin.evaluation.protocols import Protocol, read_dreambooth_prompts, read_protocol, settle
from lcp_plugin.evaluation.sweep import create_executor, execute_plan, plan_runs
from lcp_plugin.evaluation.tables import to_markdown
from lcp_plugin.files import write_json
from lcp_plugin.report import write_report


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """--metrics, --encoder, sampling: everything that decides what a score is."""
    group = parser.add_argument_group("scores")
    group.add_argument("--metrics", nargs="+", default=["effnet"], help=", ".join(METRICS))
    group.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="weights of an encoder: a folder or a file, #SHA256 appended to check it",
    )
    group.add_argument("--protocol", type=Path, help="TOML file: images, steps, prompts, ...")
    group.add_argument("--prompt_list", type=Path, help="DreamBooth's prompts_and_classes.txt")
    group.add_argument("--prompts", type=int, help="prompts per task (all)")
    group.add_argument("--images", type=int, help="images per prompt (8)")
    group.add_argument("--steps", type=int, help="denoising steps (50)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance (5)")
    group.add_argument("--latent_seed", type=int, help="seed of the starting latents (42)")
    group.add_argument("--size", type=int, help="pixels per side (the base's own)")
    group.add_argument("--device", help="cpu, cuda, ... (cuda where there is one)")
    group.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the model (fp16 on cuda, else fp32)"
    )
    group.add_argument("--batch_size", type=int, default=8, help="images made at once")
    group.add_argument("--vae", help="a replacement VAE, as in training")
    group.add_argument(
        "--extras",
        nargs="*",
        default=[],
        choices=("bleed", "leakage", "drift", "diversity", "multi", "losses"),
        help="more than the paper; see the report",
    )


def build_parser() -> argparse.ArgumentParser:
    """Options of tools/evaluate.py."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Scores what a chain of tasks has learned and forgotten, or any two folders.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs' folders")
    parser.add_argument("--generated", type=Path, help="score this folder of images")
    parser.add_argument(
        "--references",
        type=Path,
        help="with --generated: a folder of images; with runs: one folder per task name in it",
    )
    parser.add_argument("--prompt", help="with --generated: the prompt of every image, for clip_t")
    parser.add_argument("--adapters", nargs="+", type=Path, help="LoRA files, one per task")
    parser.add_argument("--tasks", type=Path, help="config whose [[tasks]] were learned")
    parser.add_argument("--base", help="base model of the adapters; alone: score the base itself")
    parser.add_argument("--output", type=Path, help="folder of the scores (RUN/evaluation)")
    add_scoring_options(parser)
    return parser


def run_command(argv: Sequence[str]) -> str:
    """Runs tools/evaluate.py; returns what it prints. LcpError where something does not fit."""
    args = build_parser().parse_args(argv)
    if args.generated is not None:
        return score_two_folders(args)
    chains = collect_chains(args)
    folder = args.output or (args.runs[0] / "evaluation" if args.runs else Path("evaluation"))
    text = evaluate_chains(chains, args, folder)
    return f"{text}\nscores  {folder / 'scores.json'}"


def score_two_folders(args: argparse.Namespace) -> str:
    """--generated A --references B: every image of one against every image of the other."""
    if args.references is None:
        raise ConfigError("--generated also needs --references, the folder to compare with.")
    metrics = choose_metrics(args.metrics)
    paths = parse_encoder_paths(args.encoder)
    generated, references = list_images(args.generated), list_images(args.references)
    device = choose_device(args.device)
    caches = {
        name: EmbeddingCache(load_encoder(name, paths.get(name), device), None)
        for name in dict.fromkeys(m.encoder for m in metrics)
    }
    prompts = [args.prompt] * len(generated) if args.prompt else read_prompts(generated)
    scores = score_folders(generated, references, metrics, caches, prompts)
    folder = args.output or Path("evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "scores": scores,
        "generated": {"folder": str(args.generated), "images": len(generated)},
        "references": {"folder": str(args.references), "images": len(references)},
        "encoders": {n: {"weights_sha256": c.encoder.fingerprint} for n, c in caches.items()},
    }
    write_json(folder / "scores.json", facts)
    lines = [f"{METRICS[name].title:8} {score:.4f}" for name, score in scores.items()]
    return "\n".join([*lines, f"scores   {folder / 'scores.json'}"])


def read_prompts(files: Sequence[Path]) -> list[str]:
    """The prompt in each PNG's metadata; empty where any has none."""
    from PIL import Image

    prompts: list[str] = []
    for file in files:
        with Image.open(file) as image:
            prompts.append(str(getattr(image, "text", {}).get("prompt", "")))
    return prompts if all(prompts) else []


def collect_chains(args: argparse.Namespace) -> list[Chain]:
    """The runs, adapters or base that the arguments name."""
    if args.runs:
        chains = [read_chain(run.resolve(), args.references) for run in args.runs]
        known = {t.name: t for t in read_tasks(args.tasks, None)} if args.tasks else {}
        return [fill_references(chain, known) for chain in chains]
    if args.tasks is None or (args.adapters is None and args.base is None):
        raise ConfigError(
            "nothing to score: give runs' folders, or --adapters with --base and --tasks, or "
            "--base with --tasks, or --generated with --references."
        )
    from lcp_plugin.sdxl.load import identify_base

    tasks = read_tasks(args.tasks, args.references)
    base = identify_base(args.base)
    if args.adapters is None:
        return [Chain(base.name, base.name, "base", base.name, base.hash, tuple(tasks), ())]
    return [chain_of_adapters(args.adapters, tasks, base.name, base.hash)]


def read_tasks(config: Path, references: Path | None) -> list[EvalTask]:
    """The [[tasks]] of a run's config, with their images or those in `references`."""
    from lcp_plugin.config.load import load_config

    tasks = []
    for index, task in enumerate(load_config(["--config", str(config)]).tasks, 1):
        folders = [Path(s.image_dir) for d in task.datasets for s in d.subsets]
        folders = [references / task.name] if references is not None else folders
        images = [
            p
            for folder in folders
            for p in sorted(folder.iterdir() if folder.is_dir() else ())
            if p.suffix.lower() in SUFFIXES
        ]
        tasks.append(
            EvalTask(index, task.name, task.kind, task.concept, task.eval_prompts, tuple(images))
        )
    return tasks


def evaluate_chains(chains: Sequence[Chain], args: argparse.Namespace, folder: Path) -> list[Table]:
    """Scores chains as the options say and writes everything into `folder`."""
    evaluation = create_evaluation(args, folder)
    chains = [
        replace(chain, tasks=tuple(evaluation.protocol.apply(t) for t in chain.tasks))
        for chain in chains
    ]
    evaluation.load_encoders()
    entries = [evaluation.score_chain(chain) for chain in chains]
    extras: dict[str, Any] = {}
    if args.extras:
        from lcp_plugin.evaluation.extras import measure_extras

        extras = {"extras": measure_extras(evaluation, chains, entries, args.extras)}
    scores = collect_scores(evaluation, entries, extras)
    tables = write_scores(evaluation, scores, folder)
    told = [f"{table.caption}\n\n{to_markdown(table)}" for table in tables]
    return "\n".join([*told, tell_differences(scores)])


def create_evaluation(args: argparse.Namespace, folder: Path) -> Evaluation:
    """The evaluation that the scoring options describe."""
    return Evaluation(
        folder=folder,
        metrics=choose_metrics(args.metrics),
        protocol=choose_protocol(args),
        encoder_paths=parse_encoder_paths(args.encoder),
        device=choose_device(args.device),
        dtype=args.dtype or ("fp16" if choose_device(args.device).startswith("cuda") else "fp32"),
        batch_size=args.batch_size,
        vae=args.vae,
    )


def choose_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol file, or the paper's defaults, with what the options override."""
    overrides = {
        "images": args.images,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.latent_seed,
        "size": args.size,
        "count": args.prompts,
    }
    listed = read_dreambooth_prompts(args.prompt_list) if args.prompt_list else {}
    if args.protocol is not None:
        return read_protocol(args.protocol, overrides, listed)
    return settle(Protocol(prompts=listed), overrides)


def choose_parallel() -> int:
    """Runs at a time: one on a GPU; small models on a CPU train best with one core each."""
    import torch

    return 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


def choose_device(name: str | None) -> str:
    """What was asked for, else cuda where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------ many runs


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
    group.add_argument("--executor", choices=("here", "local", "slurm"), default="here")
    group.add_argument(
        "--job", nargs="*", default=[], metavar="KEY=VALUE", help="parameters of submitit's jobs"
    )
    group.add_argument(
        "--parallel", type=int, help="runs at a time here (the CPU's cores; 1 with cuda)"
    )
    group.add_argument("--plan", action="store_true", help="print the runs and stop")
    parser.set_defaults(**defaults)


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
        args.orders,
        args.seeds,
        args.output.resolve() / "runs",
        extra,
    )
    if args.plan:
        return "\n".join(" ".join(run.arguments) for run in plan.runs)
    began = time.monotonic()
    executor = create_executor(args.executor, args.output.resolve() / "jobs", args.job)
    execute_plan(plan, executor, args.parallel or choose_parallel())
    trained = time.monotonic() - began
    tasks = {task.name: task for task in read_tasks(args.config, None)}
    chains = [fill_references(read_chain(run.store.root), tasks) for run in plan.runs]
    text = evaluate_chains(chains, args, args.output)
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


def fill_references(chain: Chain, tasks: Mapping[str, EvalTask]) -> Chain:
    """The chain with the images of a config's tasks where it has recorded none of its own."""
    filled = tuple(
        replace(t, references=tasks[t.name].references)
        if not t.references and t.name in tasks
        else t
        for t in chain.tasks
    )
    return replace(chain, tasks=filled)
