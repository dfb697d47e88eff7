"""The precision that pretraining computes in on this machine."""

from __future__ import annotations

from typing import Any

import torch

from lcp_plugin.sdxl.stored import is_native


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it itself (AVX-512 and later, as oneDNN tells), else
    float32: without those instructions PyTorch's bfloat16 products take dozens of times longer."""
    return torch.bfloat16 if is_native(torch.bfloat16) else torch.float32


def fast_autocast(enabled: bool = True) -> Any:
    """Autocast to `fast_dtype`; no change where that is float32."""
    dtype = fast_dtype()
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled and dtype == torch.bfloat16)
