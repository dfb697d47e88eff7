"""Measures this project beside named baselines, both in the same run: what counts is the ratio.

    OMP_NUM_THREADS=1 python tools/bench.py --size tiny
    OMP_NUM_THREADS=1 python tools/bench.py --size topo --json topo.json
    OMP_NUM_THREADS=1 python tools/bench.py --size sdxl --only fuse magmax
    python tools/bench.py --size sdxl --device cuda --json card.jsonl

Nothing is downloaded. `sdxl` needs about 16 GB of memory and 20 GB of disk in TMPDIR.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.command import run_command

    try:
        print(run_command(sys.argv[1:] if argv is None else argv))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
