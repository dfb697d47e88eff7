"""The four strategies on the same tasks, sharing the first one, as the paper's table.

    python tools/compare.py                                  # configs/quickstart.toml, two seeds
    python tools/compare.py --config my.toml --seeds 0 1 2 --output comparison

The base row and the ceilings `independent` and `joint` are in the table; every run, its scores and
one report.html are in --output; images are made with the config's sample_steps and guidance_scale
unless --steps and --guidance say otherwise. Stopped and started again, it goes on. Options that
this tool does not know go to the training command: --max_train_steps 200.
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
    "config": Path(__file__).resolve().parents[1] / "configs" / "quickstart.toml",
    "strategies": ["naive", "merge_init", "merge_ortho_init", "magmax"],
    "ceilings": ["independent", "joint"],
    "orders": [None],
    "seeds": [0, 1],
    "output": Path("comparison"),
    "prompts": 2,
    "images": 4,
    "samples_of_config": True,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcp_plugin").setLevel(logging.INFO)
    from lcp_plugin.evaluation.command import add_scoring_options
    from lcp_plugin.sweep.command import add_sweep_options, run_sweep

    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Four strategies on the same tasks, as the paper's table.",
        epilog="Unless given: 2 prompts, 4 images, the config's sample_steps and guidance_scale.",
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
