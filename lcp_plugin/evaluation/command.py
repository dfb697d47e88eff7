"""The command line of tools/evaluate.py, and the scoring options that other tools share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.aggregate import (
    collect_scores,
    tell_differences,
    tell_kept,
    write_scores,
)
from lcp_plugin.evaluation.ahead import draw_ahead
from lcp_plugin.evaluation.chains import Chain
from lcp_plugin.evaluation.embeddings import EmbeddingCache
from lcp_plugin.evaluation.evaluate import Evaluation, score_folders
from lcp_plugin.evaluation.extras import EXTRAS, measure_extras
from lcp_plugin.evaluation.images import require_images
from lcp_plugin.evaluation.inputs import collect_chains
from lcp_plugin.evaluation.metrics import (
    METRICS,
    choose_metrics,
    load_encoder,
    parse_encoder_paths,
)
from lcp_plugin.evaluation.protocols import (
    Protocol,
    override,
    read_dreambooth_prompts,
    read_protocol,
)
from lcp_plugin.evaluation.tables import to_markdown
from lcp_plugin.formats.disk import write_json
from lcp_plugin.formats.precisions import PRECISIONS
from lcp_plugin.sdxl.devices import choose_device
from lcp_plugin.store.lock import locked


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
    group.add_argument("--device", help="cpu, cuda, mps, ... (a GPU where there is one)")
    group.add_argument(
        "--dtype", choices=tuple(PRECISIONS), help="of the model (fp16 on cuda, else fp32)"
    )
    group.add_argument("--batch_size", type=int, default=8, help="images made at once")
    group.add_argument("--vae", help="a replacement VAE, as in training")
    group.add_argument(
        "--extras",
        nargs="*",
        default=[],
        choices=tuple(EXTRAS),
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
    parser.add_argument(
        "--base",
        help="base model of the adapters; alone: score the base itself; with runs: where their "
        "base lies now",
    )
    parser.add_argument(
        "--base_weights", nargs="+", default=[], help="LoRA files that belong to the base"
    )
    parser.add_argument(
        "--base_weights_multiplier", nargs="+", type=float, default=[], help="of each (1)"
    )
    parser.add_argument("--output", type=Path, help="folder of the scores (RUN/evaluation)")
    parser.add_argument(
        "--parallel", type=count, default=1, metavar="N", help="processes that make images (1)"
    )
    add_scoring_options(parser)
    return parser


def count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number, 1 or more")
    return int(text)


def run_command(argv: Sequence[str]) -> str:
    """Runs tools/evaluate.py; returns what it prints. LcpError where something does not fit."""
    args = build_parser().parse_args(argv)
    if args.generated is not None:
        return score_two_folders(args)
    chains = collect_chains(args)
    folder = args.output or (args.runs[0] / "evaluation" if args.runs else Path("evaluation"))
    text = evaluate_chains(chains, args, folder, args.parallel)
    return f"{text}\nscores  {folder / 'scores.json'}"


def score_two_folders(args: argparse.Namespace) -> str:
    """--generated A --references B: every image of one against every image of the other."""
    if args.references is None:
        raise ConfigError("--generated also needs --references, the folder to compare with.")
    metrics = choose_metrics(args.metrics)
    paths = parse_encoder_paths(args.encoder)
    generated, references = require_images(args.generated), require_images(args.references)
    device = choose_device(args.device)
    caches = {
        name: EmbeddingCache(load_encoder(name, paths.get(name), device), None)
        for name in dict.fromkeys(m.encoder for m in metrics)
    }
    prompts = [args.prompt] * len(generated) if args.prompt else read_png_prompts(generated)
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


def read_png_prompts(files: Sequence[Path]) -> list[str]:
    """The prompt in each PNG's metadata; empty where any has none."""
    from PIL import Image

    prompts: list[str] = []
    for file in files:
        with Image.open(file) as image:
            prompts.append(str(getattr(image, "text", {}).get("prompt", "")))
    return prompts if all(prompts) else []


def evaluate_chains(
    chains: Sequence[Chain], args: argparse.Namespace, folder: Path, parallel: int = 1
) -> str:
    """Scores chains as the options say, writes everything into `folder`; what is to be printed.

    `parallel` processes make the images.

    Raises:
        DiskError: another evaluation writes there.
    """
    busy = f"another evaluation writes into {folder}; wait for it, or choose another --output."
    with locked(folder, folder.name, busy):
        return _evaluate_alone(chains, args, folder, parallel)


def _evaluate_alone(
    chains: Sequence[Chain], args: argparse.Namespace, folder: Path, parallel: int
) -> str:
    evaluation = create_evaluation(args, folder)
    chains = [
        replace(chain, tasks=tuple(evaluation.protocol.apply(t) for t in chain.tasks))
        for chain in chains
    ]
    evaluation.load_encoders()
    draw_ahead(evaluation, chains, parallel)
    entries = [evaluation.score_chain(chain) for chain in chains]
    extras: dict[str, Any] = {}
    if args.extras:
        extras = {"extras": measure_extras(evaluation, chains, entries, args.extras)}
    scores = collect_scores(evaluation, entries, extras)
    tables = write_scores(evaluation, scores, folder)
    told = [f"{table.caption}\n\n{to_markdown(table)}" for table in tables]
    kept = tell_kept(entries)
    return "\n".join([*([kept, ""] if kept else []), *told, tell_differences(scores)])


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
    return override(Protocol(prompts=listed), overrides)
