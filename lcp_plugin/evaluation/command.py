"""What `lcp evaluate` does, and what others share of it: scores as the arguments say."""

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
from lcp_plugin.evaluation.cut_prompts import limit_tokens, warn_of_cut_prompts
from lcp_plugin.evaluation.embeddings import EmbeddingCache
from lcp_plugin.evaluation.evaluate import Evaluation, score_folders
from lcp_plugin.evaluation.extras import choose_extras, measure_extras
from lcp_plugin.evaluation.images import require_images
from lcp_plugin.evaluation.inputs import collect_chains
from lcp_plugin.evaluation.metric_table import METRICS
from lcp_plugin.evaluation.metrics import (
    choose_metrics,
    load_encoder,
    parse_encoder_paths,
)
from lcp_plugin.evaluation.options import build_parser
from lcp_plugin.evaluation.protocols import (
    Protocol,
    override,
    read_dreambooth_prompts,
    read_protocol,
)
from lcp_plugin.evaluation.tables import to_markdown
from lcp_plugin.formats.disk import write_json
from lcp_plugin.sdxl.devices import choose_device
from lcp_plugin.store.lock import locked


def run_command(argv: Sequence[str]) -> str:
    """`lcp evaluate` with these arguments; returns what it prints. Raises LcpError."""
    return evaluate(build_parser().parse_args(argv))


def evaluate(args: argparse.Namespace) -> str:
    """The scores that the arguments ask for, as they are printed. Raises LcpError."""
    if args.generated is not None:
        return score_two_folders(args)
    chains = limit_tokens(collect_chains(args), args.max_token_length)
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
    evaluation, extras_asked = create_evaluation(args, folder), choose_extras(args.extras)
    chains = [
        replace(chain, tasks=tuple(evaluation.protocol.apply(t) for t in chain.tasks))
        for chain in chains
    ]
    warn_of_cut_prompts(chains)
    evaluation.load_encoders()
    draw_ahead(evaluation, chains, parallel)
    entries = [evaluation.score_chain(chain) for chain in chains]
    extras: dict[str, Any] = {}
    if extras_asked:
        extras = {"extras": measure_extras(evaluation, chains, entries, extras_asked)}
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
