"""lcp init PHOTOS: a folder of folders of photos becomes a commented configuration that runs.

    lcp init photos
    lcp init photos --kind watercolor=style --output mine.toml
    lcp init photos --base sd_xl_base_1.0.safetensors --preset 12gb

Each folder in PHOTOS becomes a task. A folder named like kohya's `10_sks dog` says how often its
images count and what prompts call them; captions beside the images are used. What is guessed stands
in the file with its reason. Nothing is overwritten.
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
    parser.add_argument("--strategy", default="recall", help="what keeps earlier tasks (recall)")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Writes the configuration and tells its plan; returns the exit status."""
    given = build_parser().parse_args(argv)
    from lcp_plugin.initial.making import Request, make_config

    request = Request(
        photos=given.photos,
        output=given.output,
        base=given.base,
        kinds=tuple(given.kind),
        preset=given.preset,
        strategy=given.strategy,
    )
    print(make_config(request))
    return 0
