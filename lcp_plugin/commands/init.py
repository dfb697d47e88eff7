"""lcp init PHOTOS: a folder of folders of photos becomes a commented configuration that runs.

    lcp init photos
    lcp init photos --kind watercolor=style --output mine.toml
    lcp init photos --base sd_xl_base_1.0.safetensors --preset 12gb
    lcp init more_photos --prev output/mine

Each folder in PHOTOS becomes a task. A folder named like kohya's `10_sks dog` says how often its
images count and what prompts call them; captions beside the images are used. What is guessed stands
in the file with its reason. Nothing is overwritten. With --prev the configuration goes on from a
run, a task folder or any SDXL LoRA: with its base, strategy, rank and alpha, and without names and
words that its tasks have. Folders that it has learned are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser


def build_parser() -> argparse.ArgumentParser:
    """Which photos, and what the user knows better than a guess."""
    parser = Parser("init", __doc__, "PHOTOS", abbreviations=False)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of folders of photos")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to write (PHOTOS' name, .toml)"
    )
    parser.add_argument(
        "--base", help="file, diffusers folder, hub id or tiny-sdxl (with a GPU SDXL, else tiny)"
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        default=[],
        metavar="[FOLDER=]KIND",
        help="object or style, for all folders or for one (guessed)",
    )
    parser.add_argument("--preset", help="8gb, 12gb or 24gb (what fits on this machine)")
    parser.add_argument("--strategy", help="what keeps earlier tasks (the chain's, else recall)")
    parser.add_argument(
        "--prev", type=Path, metavar="CHAIN", help="go on from this run, task folder or LoRA file"
    )
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Writes the configuration and tells its plan; returns the exit status."""
    given = build_parser().parse_args(argv)
    from lcp_plugin.initial.making import make_config
    from lcp_plugin.initial.recipe import Request

    request = Request(
        photos=given.photos,
        output=given.output,
        base=given.base,
        kinds=tuple(given.kind),
        preset=given.preset,
        strategy=given.strategy,
        prev=given.prev,
    )
    print(make_config(request))
    return 0
