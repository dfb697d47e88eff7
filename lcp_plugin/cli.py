"""The command line of train_continual_sdxl.py: configuration first, heavy imports after it is
checked.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.errors import LcpError

INTERRUPTED = 130
OUT_OF_MEMORY = (
    "out of memory; what helps, strongest first: --gradient_checkpointing, --cache_latents and "
    "--cache_text_encoder_outputs, --mixed_precision bf16, --optimizer_type AdamW8bit, a smaller "
    "--resolution or --network_dim (--preset 8gb sets them together)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or answers a question about it; returns the exit status."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for library in ("httpx", "accelerate", "PIL", "matplotlib"):
            logging.getLogger(library).setLevel(logging.WARNING)
        return _answer(config) or _train(config)
    except LcpError as error:
        for line in str(error).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state.", file=sys.stderr)
        return INTERRUPTED


def _answer(config: RunConfig) -> int:
    if config.options.list_strategies:
        from lcp_plugin.registry import describe_strategies

        print(describe_strategies())
        raise SystemExit(0)
    if config.options.dry_run:
        from lcp_plugin.data.dry_run import describe_run

        print(describe_run(config))
        raise SystemExit(0)
    return 0


def _train(config: RunConfig) -> int:
    for notice in config.notices:
        print(notice, file=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from lcp_plugin.closing import close_run
    from lcp_plugin.runner import execute, summarise
    from lcp_plugin.trainer import Interrupted

    try:
        run = execute(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return INTERRUPTED
    except torch.OutOfMemoryError:
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    if run.is_main:
        run.trainer = None  # the model leaves memory before another is loaded for the scores
        closing = close_run(run.output_dir, run.options, run.device)
        print("\n".join([summarise(run), *closing]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
