"""The options of `lcp evaluate`, and those that decide what a score is; no model is imported."""

from __future__ import annotations

import argparse
from pathlib import Path

from lcp_plugin.config.options import option_fields
from lcp_plugin.config.parser import Parser, count, finite, seed
from lcp_plugin.evaluation.metric_table import METRICS

DTYPES = tuple(
    word for word in option_fields()["save_precision"].metadata["choices"] if word != "float"
)


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
    group.add_argument("--prompts", type=count, help="prompts per task (all)")
    group.add_argument("--images", type=count, help="images per prompt (8)")
    group.add_argument("--steps", type=count, help="denoising steps (50)")
    group.add_argument("--guidance", type=finite, help="classifier-free guidance (5)")
    group.add_argument("--latent_seed", type=seed, help="seed of the starting latents (42)")
    group.add_argument("--size", type=count, help="pixels per side (the base's own)")
    group.add_argument("--device", help="cpu, cuda, mps, ... (a GPU where there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="of the model (fp16 on cuda, else fp32)")
    group.add_argument("--batch_size", type=count, default=8, help="images made at once")
    group.add_argument("--vae", help="a replacement VAE, as in training")
    group.add_argument(
        "--extras",
        nargs="*",
        default=[],
        metavar="NAME",
        help="more than the paper: bleed, leakage, drift, diversity, multi, recognition, losses",
    )


def build_parser(about: str | None = None) -> argparse.ArgumentParser:
    """Options of `lcp evaluate`."""
    parser = Parser("evaluate", about, "RUN ...")
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
        "--base_weights_multiplier", nargs="+", type=finite, default=[], help="of each (1)"
    )
    parser.add_argument(
        "--max_token_length",
        type=int,
        choices=option_fields()["max_token_length"].metadata["choices"],
        help="tokens of a prompt (as in training)",
    )
    parser.add_argument("--output", type=Path, help="folder of the scores (RUN/evaluation)")
    parser.add_argument(
        "--parallel", type=count, default=1, metavar="N", help="processes that make images (1)"
    )
    add_scoring_options(parser)
    return parser
