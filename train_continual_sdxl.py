"""Train SDXL LoRAs one after another without forgetting; a drop-in for sdxl_train_network.py.

accelerate launch train_continual_sdxl.py --config quickstart.toml
accelerate launch train_continual_sdxl.py --config mine.toml --prev last_month.safetensors
"""

import sys

from lcp_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
