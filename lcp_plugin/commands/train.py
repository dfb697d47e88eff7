"""Learn a sequence of tasks with an SDXL LoRA: `lcp train`, and `train_continual_sdxl.py`.

    lcp train --config quickstart
    lcp train --config mine.toml --prev last_month.safetensors
    accelerate launch -m lcp_plugin train --config mine.toml      on several GPUs

All of it is `lcp_plugin.cli`, which a sweep starts too.
"""

from __future__ import annotations

import sys

from lcp_plugin.cli import main
from lcp_plugin.config.flags import build_parser

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
