"""Pretrain the embedded base `tiny-sdxl` from nothing, on one CPU core.

    npm pack emoji-datasource-google@16.0.0     # Noto Emoji, Apache-2.0
    npm pack emoji-datasource-twitter@16.0.0    # Twemoji, CC-BY 4.0
    mkdir sprites
    for p in emoji-datasource-google emoji-datasource-twitter; do
        mkdir sprites/$p && tar -xzf $p-*.tgz -C sprites/$p
    done
    python tools/pretrain_tiny_base.py --sprites sprites --work pretrain

Never the Apple or Facebook sets: they are not free. Stages, each resumable with the same command:
`vae` (autoencoder), `world` (draw the scenes), `unet` (UNet and both text encoders), `export`
(write the averaged weights to --model). The schedule counts about as many steps as the shipped
base had (one core needs an estimated 2 hours with bfloat16 instructions, 4 without), and the same
seed, libraries and thread count give the same weights bit for bit; with --vae_minutes /
--unet_minutes it follows the clock and does as many steps as fit.

    --gate                  the quality figures as JSON (classifier on samples, PSNR, rare words);
                            the classifier's confusion matrices into confusion.csv of the model
    --grid FILE             the grid of 48 prompts
    --render_quickstart DIR the objects and styles of configs/quickstart
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError  # noqa: E402
from lcp_plugin.telling.wording import counted
from lcp_plugin.tiny import model_dir  # noqa: E402

STAGES = ("vae", "world", "unet", "export", "all", "none")
STEPS = {"vae": 3_500, "unet": 6_600}  # the shipped base had 3,539 and 3,935 + 2,698


def build_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", choices=STAGES, help="default: all, or none with an option of the last group")
    add("--sprites", type=Path, help="folder with the two unpacked npm packages")
    add("--work", type=Path, help="folder for pictures, latents and checkpoints (about 900 MB)")
    add("--model", type=Path, default=model_dir(), help="model folder to export to or measure")
    add("--start_from", type=Path, metavar="DIR", help="go on from an exported model's weights")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="torch threads")
    for part, steps in STEPS.items():
        limit = parser.add_mutually_exclusive_group()
        limit.add_argument(f"--{part}_steps", type=int, default=steps, help=f"({steps})")
        limit.add_argument(f"--{part}_minutes", type=float, help="train so long instead")
    extra = parser.add_argument_group("after training")
    extra.add_argument("--gate", action="store_true", help="print the quality figures as JSON")
    extra.add_argument("--samples", type=int, default=500, help="samples that --gate takes")
    extra.add_argument("--grid", type=Path, metavar="FILE", help="write the grid of 48 prompts")
    extra.add_argument("--render_quickstart", type=Path, metavar="DIR", help="write its images")
    return parser


def train(args: argparse.Namespace, stage: str) -> None:
    """Run one stage or all of them."""
    from tiny_base import stages
    from tiny_base.schedule import Budget

    plan = stages.Plan(work=args.work, sprites=args.sprites, seed=args.seed)

    def budget(part: str) -> Budget:
        minutes = getattr(args, f"{part}_minutes")
        return Budget(minutes=minutes) if minutes else Budget(steps=getattr(args, f"{part}_steps"))

    if stage in ("vae", "all"):
        stages.run_vae(plan, budget("vae"))
    if stage == "world":
        stages.run_world(plan)
    if stage in ("unet", "all"):
        stages.run_unet(plan, budget("unet"), args.start_from)
    if stage in ("export", "all"):
        stages.export_model(plan, args.model)


def load_model(folder: Path) -> Any:
    """The pipeline in `folder`, fp32."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of the model in --model; its samples as a grid beside the checkpoints, and the
    classifier's confusion matrices into the model's folder."""
    from tiny_base import gate, grid, stages
    from tiny_base.render import Sprites

    plan = stages.Plan(work=args.work, sprites=args.sprites, seed=args.seed)
    pipeline = load_model(args.model)
    sprites, file = Sprites(args.sprites), args.work / "classifier.safetensors"
    figures, shown, prompts = gate.run_gate(pipeline, sprites, file, args.seed, args.samples)
    grid.draw_grid(shown[:96], prompts[:96], args.work / "gate_samples.png")
    parts = {"renders": "classifier_on_held_out_renders", "samples": "samples"}
    confusions = {part: figures[key].pop("confusion") for part, key in parts.items()}
    gate.write_confusion(confusions, args.model / "confusion.csv")
    for part, key in parts.items():
        figures[key]["mistakes"] = {
            head: gate.most_frequent_mistakes(counts) for head, counts in confusions[part].items()
        }
    return {**figures, "vae": stages.measure_vae(pipeline.vae, plan)}


def run(args: argparse.Namespace) -> None:
    """What the options ask for, in order."""
    later = args.gate or args.grid or args.render_quickstart
    stage = args.stage or ("none" if later else "all")
    if (stage != "none" or args.gate) and not (args.sprites and args.work):
        raise LcpError("--sprites and --work are needed to train or to measure; see --help.")
    if stage != "none":
        train(args, stage)
    if args.grid:
        from tiny_base.grid import GRID_PROMPTS, draw_grid, sample_pictures

        pictures = sample_pictures(load_model(args.model), GRID_PROMPTS, seed=1)
        draw_grid(pictures, GRID_PROMPTS, args.grid)
    if args.gate:
        print(json.dumps(measure(args), indent=1))
    if args.render_quickstart:
        from tiny_base.novel import render_quickstart

        print(f"{counted(render_quickstart(args.render_quickstart), 'image')}")


def main() -> int:
    """Command line; errors a user can mend are one line."""
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    torch.set_num_threads(args.threads)
    try:
        run(args)
    except LcpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
