"""Strategies x orders x seeds, here or on a cluster: one command from nothing to the tables.

    python tools/sweep.py --config configs/objects.toml --orders 0 5 10 42 --seeds 0 5 \\
        --metrics clip_i dino --output sweep
    python tools/sweep.py ... --executor slurm --job slurm_partition=gpu gpus_per_node=1

Runs of one order and seed share their first task. Finished runs are left alone, unfinished ones
resumed. Options that this tool does not know go to the training command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError

DEFAULTS = {
    "strategies": ["naive", "merge_init", "merge_ortho_init", "magmax"],
    "ceilings": [],
    "orders": [0, 5, 10, 42],
    "seeds": [0, 5],
    "output": Path("sweep"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcp_plugin").setLevel(logging.INFO)
    from lcp_plugin.evaluation.command import add_scoring_options
    from lcp_plugin.sweep.command import add_sweep_options, run_sweep

    parser = argparse.ArgumentParser(
        prog="sweep.py", description="Strategies x orders x seeds, scored in one table."
    )
    add_scoring_options(parser)
    add_sweep_options(parser, DEFAULTS)
    try:
        print(run_sweep(sys.argv[1:] if argv is None else argv, parser))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
