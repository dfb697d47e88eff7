"""Show where a LoRA comes from: what it was trained on, its trigger words, its chain, verified.

    python tools/lineage.py out/objects.safetensors
    python tools/lineage.py someones_lora.safetensors --toml > again.toml
    python tools/lineage.py out/objects --toml       # a run's or a task's folder: with its images

Works on our deliverables, task folders and runs, and on files of kohya, OneTrainer and ai-toolkit.
Parents are found by the hash of their tensors, beside the file and in --search folders.
Exit status 1: a recorded hash differs from the file that was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lcp_plugin.delivery.chain_tree import Search, failed, trace
from lcp_plugin.delivery.retraining import retraining_config
from lcp_plugin.errors import LcpError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a LoRA file, a task folder or a run folder")
    parser.add_argument(
        "--search", type=Path, nargs="+", default=[], help="folders to look for parents in"
    )
    parser.add_argument("--base", help="the base model, to verify its hash")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--toml", action="store_true", help="print TOML that would train it again")
    kinds.add_argument("--json", action="store_true", help="print the tree as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.toml:
            print(retraining_config(options.file), end="")
            return 0
        base_hash = ""
        if options.base:
            from lcp_plugin.sdxl.load import identify_base

            base_hash = identify_base(options.base).hash
        tree = trace(options.file, Search(tuple(options.search), base_hash))
    except LcpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(asdict(tree), indent=2, ensure_ascii=False))
    else:
        print("\n".join(tree.render()))
    return 1 if failed(tree.all_checks()) else 0


if __name__ == "__main__":
    sys.exit(main())
