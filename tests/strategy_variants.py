"""The built-in strategies under every option that changes their formulas."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcp_plugin.hooks import Strategy
from lcp_plugin.strategies import BUILT_IN

FOUR = ("naive", "merge_init", "merge_ortho_init", "magmax")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BUILT_IN},
    "ortho factor_sum": ("merge_ortho_init", {"merge": "factor_sum"}),
    "ortho row_null": ("merge_ortho_init", {"mode": "row_null", "scale": "match_gaussian"}),
    "magmax original": ("magmax", {"reference": "original"}),
    "magmax scaled": ("magmax", {"scale": 0.7}),
    "naive kaiming": ("naive", {"init": "kaiming"}),
}


def make(variant: str) -> Strategy:
    name, options = VARIANTS[variant]
    return BUILT_IN[name](**options)


def columns_overlap(a: Tensor, b: Tensor) -> float:
    """The largest |cosine| between equal-numbered columns."""
    return float(((a * b).sum(dim=0) / (a.norm(dim=0) * b.norm(dim=0))).abs().max())
