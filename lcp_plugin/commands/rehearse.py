"""Draws what a LoRA knows as regularisation images, for those who stay in their trainer.

    lcp rehearse output/my_run --output rehearsal
    lcp rehearse my_run.safetensors --base BASE --images 32
    lcp rehearse anyones.safetensors --base BASE --prompts "a photo of sks dog"

sd-scripts, OneTrainer and ai-toolkit read the folder: pictures, captions, a dataset_config.toml.
Pictures are drawn once: stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command, tell_progress
from lcp_plugin.config.parser import Parser, count, seed
from lcp_plugin.errors import DataError, Page, explaining
from lcp_plugin.evaluation.options import DTYPES


def build_parser() -> argparse.ArgumentParser:
    """What is drawn, of what, and how."""
    parser = Parser("rehearse", __doc__, "RUN_OR_LORA")
    parser.add_argument("source", type=Path, help="a run, a task folder, or anyone's LoRA file")
    parser.add_argument("-o", "--output", type=Path, default=Path("rehearsal"), help="(rehearsal)")
    parser.add_argument("--images", type=count, default=16, help="of each concept (16)")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="what another tool's LoRA was trained with"
    )
    parser.add_argument(
        "--settings", type=float, default=0.5, help="share of images with other settings (.5)"
    )
    parser.add_argument("--base", default="", help="base model, where the LoRA does not say")
    parser.add_argument("--steps", type=count, default=30, help="denoising steps (30)")
    parser.add_argument("--guidance", type=float, default=5.0, help="(5)")
    parser.add_argument("--seed", type=seed, default=42, help="of the starting noise (42)")
    parser.add_argument("--size", type=count, help="pixels per side (the base's own)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(fp16 on cuda, else fp32)")
    parser.add_argument("--batch_size", type=count, default=4, help="images drawn at once (4)")
    parser.add_argument("--vae", help="a replacement VAE, as in training")
    return parser


@command
@explaining(Page.DRAWING, DataError)
def main(argv: Sequence[str]) -> int:
    """Prints where the set lies; returns the exit status."""
    args = build_parser().parse_args(argv)
    tell_progress()
    from lcp_plugin.evaluation.rehearsal_command import rehearse

    print(rehearse(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
