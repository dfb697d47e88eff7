"""Draws what a LoRA knows as regularisation images, for those who stay in their trainer.

    python tools/rehearsal_images.py output/my_run --output rehearsal
    python tools/rehearsal_images.py my_run.safetensors --base BASE --images 32
    python tools/rehearsal_images.py anyones.safetensors --base BASE --prompts "a photo of sks dog"

sd-scripts, OneTrainer and ai-toolkit read the folder: pictures, captions, a dataset_config.toml.
Pictures are drawn once: stopped and started again, it goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.errors import LcpError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints where the set lies; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcp_plugin").setLevel(logging.INFO)
    from lcp_plugin.evaluation.rehearsal_command import run_command

    try:
        print(run_command(sys.argv[1:] if argv is None else argv))
    except LcpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
