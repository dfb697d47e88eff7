"""The precisions of weights by the words that options and tools have for them."""

from __future__ import annotations

import torch

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {"fp32": torch.float32, **HALVES}
SAVED_AS = {"float": torch.float32, **PRECISIONS}  # kohya's save_precision
