"""What `lcp rehearse` does: a set of images drawn, and how each trainer takes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.pictures import Sampling, Studio
from lcp_plugin.evaluation.rehearsal_set import SNIPPET, Wishes, draw_set, plan_set
from lcp_plugin.formats.precisions import PRECISIONS
from lcp_plugin.sdxl.devices import choose_device
from lcp_plugin.store.lock import locked
from lcp_plugin.telling.wording import counted


def rehearse(args: argparse.Namespace) -> str:
    """Draws the set; returns what is to be printed. LcpError where something does not fit."""
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
            f"{counted(images, 'image')} of {', '.join(concepts)} in {folder} ({drawn} drawn now)",
            f"sd-scripts  --dataset_config {folder / SNIPPET}, your images added to it; or "
            f"--reg_data_dir {folder} --caption_extension .txt",
            "OneTrainer  a concept for each folder, prompt source: text file per sample",
            "ai-toolkit  a dataset for each folder: folder_path, caption_ext: txt, is_reg: true",
        ]
    )
