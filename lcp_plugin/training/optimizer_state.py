"""An optimizer's state as tensors and JSON: nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.errors import ResumeError


def flatten_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by path and a JSON-able rest; nothing is pickled."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"map": [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": repr(value)}  # JSON has no words for inf and nan
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        raise ResumeError(
            f"this optimizer keeps a {type(value).__name__} in its state, which cannot be saved "
            "without pickle; use another optimizer_type or resume_every_n_steps = 0."
        )

    return tensors, walk(state, "state")


def unflatten_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Any:
    """The nested state that `flatten_state` took apart."""
    (kind, value), *_ = rest.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {key: unflatten_state(tensors, item) for key, item in value}
    if kind in ("list", "tuple"):
        items = [unflatten_state(tensors, item) for item in value]
        return items if kind == "list" else tuple(items)
    if kind == "number":
        return float(value)
    if kind == "dtype":
        return getattr(torch, value)
    return value
