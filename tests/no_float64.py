"""A GPU without float64, played by torch's meta device: Apple's is such a one, and none is here.

The meta device knows shapes and types and computes nothing. What a run asks back from it, numbers
and tensors, are zeros here; a tensor of float64 on it is an error, as on MPS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, and answers with zeros what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # that made something on the device

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        made = _answer(func, args, given)
        made = func(*args, **given) if made is None else made
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self.calls += 1
                if leaf.dtype is torch.float64:
                    raise TypeError(f"{func}: this device has no float64")
        return made


def _answer(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Any:
    """Zeros, where something leaves the meta device; None where nothing does."""
    name = func.overloadpacket.__name__
    on_meta = [a for a in args if isinstance(a, torch.Tensor) and a.device.type == "meta"]
    if not on_meta:
        return None
    if name == "_local_scalar_dense":
        return 0.0 if on_meta[0].is_floating_point() else 0
    if name == "_to_copy" and torch.device(given.get("device") or "meta").type == "cpu":
        dtype = given.get("dtype") or on_meta[0].dtype
        return torch.zeros(on_meta[0].shape, dtype=dtype)
    if name == "copy_" and args[0].device.type == "cpu":
        return args[0].zero_()
    if name == "equal":
        return False
    return None
