"""Show where a LoRA comes from: what it was trained on, its trigger words, its chain, verified.

    lcp lineage out/objects.safetensors
    lcp lineage someones_lora.safetensors --toml > again.toml
    lcp lineage out/objects --toml       # a run's or a task's folder: with its images

Works on our deliverables, task folders and runs, and on files of kohya, OneTrainer and ai-toolkit.
Parents are found by the hash of their tensors, beside the file and in --search folders.
Exit status 1: a recorded hash differs from the file that was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser
from lcp_plugin.errors import LineageError, Page, explaining


def build_parser() -> argparse.ArgumentParser:
    """Whose lineage, where its parents may lie, and how it is told."""
    parser = Parser("lineage", __doc__, "FILE")
    parser.add_argument("file", type=Path, help="a LoRA file, a task folder or a run folder")
    parser.add_argument(
        "--search", type=Path, nargs="+", default=[], help="folders to look for parents in"
    )
    parser.add_argument("--base", help="the base model, to verify its hash")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--toml", action="store_true", help="print TOML that would train it again")
    kinds.add_argument("--json", action="store_true", help="print the tree as JSON")
    return parser


@command
@explaining(Page.LINEAGE, LineageError)
def main(argv: Sequence[str]) -> int:
    """Prints the tree, or TOML; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.toml:
        from lcp_plugin.delivery.retraining import retraining_config

        print(retraining_config(args.file), end="")
        return 0
    from lcp_plugin.delivery.chain_tree import Search, failed, trace

    base_hash = ""
    if args.base:
        from lcp_plugin.sdxl.load import identify_base

        base_hash = identify_base(args.base).hash
    tree = trace(args.file, Search(tuple(args.search), base_hash))
    if args.json:
        print(json.dumps(asdict(tree), indent=2, ensure_ascii=False))
    else:
        print("\n".join(tree.render()))
    return 1 if failed(tree.all_checks()) else 0


if __name__ == "__main__":
    sys.exit(main())
