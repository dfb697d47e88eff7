"""Frozen weights kept in float8 (fp8_base, fp8_base_unet): a byte a number, cast up when used.

e4m3: 4 bits of exponent, 3 of mantissa, largest value 448 (arXiv 2209.05433). Linear and
convolution layers are kept so; norms, biases and embeddings stay as they were. `weight` remains as
a placeholder of the layer's shape and working precision that takes no memory, so that whoever asks
for shape, dtype or device gets true answers. The weight that a layer casts up lives until its
backward pass, unless gradient checkpointing casts it again.
Simple casting, without scales, as kohya-ss/sd-scripts has it (train_network.py at 48d368fa).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


class Float8Linear(nn.Linear):
    """A linear layer whose weight is stored in float8."""

    stored: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear, with the weight cast up."""
        return F.linear(input, self.stored.to(self.weight.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return _stay_small(self)


class Float8Conv2d(nn.Conv2d):
    """A convolution whose weight is stored in float8."""

    stored: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d, with the weight cast up."""
        weight = self.stored.to(self.weight.dtype)
        output: Tensor = self._conv_forward(input, weight, self.bias)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return _stay_small(self)


def store_in_float8(layers: Iterable[nn.Module]) -> int:
    """Turns linear and convolution layers into ones that store float8; their bytes afterwards."""
    total = 0
    for layer in layers:
        kinds: dict[type, type] = {nn.Linear: Float8Linear, nn.Conv2d: Float8Conv2d}
        if type(layer) not in kinds:
            continue
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        layer.register_buffer("stored", _round(weight.data), persistent=False)
        weight.data = _placeholder(weight.data)
        layer.__class__ = kinds[type(layer)]
        total += weight.numel()
    return total


def names_of_stored(root: nn.Module) -> list[str]:
    """Parameters and buffers of float8 layers, which several processes need not share."""
    return [
        f"{name}.{part}"
        for name, module in root.named_modules()
        if isinstance(module, Float8Linear | Float8Conv2d)
        for part in ("weight", "stored")
    ]


def _round(weight: Tensor) -> Tensor:
    return weight.detach().float().clamp(-LARGEST, LARGEST).to(FLOAT8)


def _placeholder(like: Tensor) -> Tensor:
    """Zeros of a shape, without memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _stay_small(layer: Float8Linear | Float8Conv2d) -> nn.Module:
    """After a move to another device, or a cast."""
    if layer.stored.dtype is not FLOAT8:
        layer.stored = _round(layer.stored)
    layer.weight.data = _placeholder(layer.weight.data)
    return layer
