"""Max-norm regularisation of LoRA updates (`scale_weight_norms`).

U = scale B A is scaled down to the norm m where ||U||_F > m; both factors take the square root of
the ratio, as in kohya-ss/sd-scripts (networks/lora.py apply_max_norm_regularization at 48d368fa).
||B A||_F is computed from two rank x rank matrices, never from the full update:
||B A||_F^2 = sum((B^T B) * (A A^T)).
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||scale B A||_F of A (rank, in) and B (out, rank)   # scalar, fp32."""
    a, b = down.detach().float(), up.detach().float()
    squared = ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0)
    return abs(scale) * squared.sqrt()


@torch.no_grad()
def limit_update_norm(down: Tensor, up: Tensor, scale: float, largest: float) -> tuple[float, bool]:
    """Scale both factors in place so that ||scale B A||_F <= largest.

    Returns the norm afterwards and whether anything was changed.
    """
    norm = float(update_norm(down, up, scale))
    if norm <= largest or norm == 0:
        return norm, False
    root = (largest / norm) ** 0.5
    down.mul_(root)
    up.mul_(root)
    return largest, True
