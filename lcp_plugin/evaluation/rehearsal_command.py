"""The command line of tools/rehearsal_images.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.command import count
from lcp_plugin.evaluation.pictures import Sampling, Studio
from lcp_plugin.evaluation.rehearsal_set import SNIPPET, Wishes, draw_set, plan_set
from lcp_plugin.formats.precisions import PRECISIONS
from lcp_plugin.sdxl.devices import choose_device
from lcp_plugin.store.lock import locked


def build_parser() -> argparse.ArgumentParser:
    """Options of tools/rehearsal_images.py."""
    parser = argparse.ArgumentParser(
        prog="rehearsal_images.py",
        description="Draws what a LoRA knows as regularisation images for any trainer.",
    )
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
    parser.add_argument("--seed", type=int, default=42, help="of the starting noise (42)")
    parser.add_argument("--size", type=count, help="pixels per side (the base's own)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (a GPU where there is one)")
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), help="(fp16 on cuda, else fp32)")
    parser.add_argument("--batch_size", type=count, default=4, help="images drawn at once (4)")
    parser.add_argument("--vae", help="a replacement VAE, as in training")
    return parser


def run_command(argv: Sequence[str]) -> str:
    """Draws the set; returns what is to be printed. LcpError where something does not fit."""
    args = build_parser().parse_args(argv)
    if not 0 <= args.settings <= 1:
        raise ConfigError(f"--settings {args.settings}: give a share from 0 to 1.")
    wishes = Wishes(args.images, args.settings, tuple(args.prompts), args.base)
    plan = plan_set(args.source, wishes)
    device = choose_device(args.device)
    dtype = args.dtype or ("fp16" if device.startswith("cuda") else "fp32")
    most = max(len(prompts) for prompts in plan.prompts.values())
    sampling = Sampling(most, args.steps, args.guidance, args.seed, args.size)
    studio = Studio(plan.base, sampling, device, PRECISIONS[dtype], args.batch_size, args.vae)
    busy = f"another process draws into {args.output}; wait for it, or choose another --output."
    with locked(args.output, args.output.name, busy):
        drawn = draw_set(plan, studio, args.output)
    return _tell(args.output, len(plan.pictures(args.output)), drawn, list(plan.prompts))


def _tell(folder: Path, images: int, drawn: int, concepts: Sequence[str]) -> str:
    """Where the set lies, and how each trainer takes it."""
    return "\n".join(
        [
            f"{images} images of {', '.join(concepts)} in {folder} ({drawn} drawn now)",
            f"sd-scripts  --dataset_config {folder / SNIPPET}, your images added to it; or "
            f"--reg_data_dir {folder} --caption_extension .txt",
            "OneTrainer  a concept for each folder, prompt source: text file per sample",
            "ai-toolkit  a dataset for each folder: folder_path, caption_ext: txt, is_reg: true",
        ]
    )
