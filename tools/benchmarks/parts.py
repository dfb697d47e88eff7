"""Parts of the bench that need a process of their own: `python -m benchmarks.parts PART ...`.

Each prints one line of JSON with what it measured. A process imports only what its part needs, so
that its peak of memory is the part's.
"""

from __future__ import annotations

import importlib
import sys

PARTS = {
    "checkpoint_ours": "checkpoint_parts:fuse_streamed",
    "checkpoint_baseline": "checkpoint_parts:fuse_whole",
    "step_ours": "steps:train_ours",
    "step_baseline": "steps:train_baseline",
    "build_base": "real_base:build_base",
}


def run(part: str, *arguments: str) -> None:
    """Runs a part by its name."""
    module, _, function = PARTS[part].partition(":")
    getattr(importlib.import_module(f"benchmarks.{module}"), function)(*arguments)


if __name__ == "__main__":
    run(*sys.argv[1:])
