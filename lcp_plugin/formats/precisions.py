"""The precisions of weights by the words that options and tools have for them."""

from __future__ import annotations

import torch
from torch import Tensor

from lcp_plugin.adapter import is_finite
from lcp_plugin.errors import NumericError

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {"fp32": torch.float32, **HALVES}
SAVED_AS = {"float": torch.float32, **PRECISIONS}  # kohya's save_precision


def check_rounded(rounded: Tensor, what: str) -> Tensor:
    """The values as rounded to their type, which were finite before.

    Raises:
        NumericError: one is beyond what the type holds.
    """
    if not is_finite(rounded):
        name = next(word for word, dtype in PRECISIONS.items() if dtype is rounded.dtype)
        raise NumericError(
            f"{what} has a value beyond what {name} holds; use save_precision = bf16 or float (of "
            "lcp export and lcp merge: --precision)."
        )
    return rounded
