"""Frozen weights kept in a smaller type than they are computed in, and cast up when used.

float8 e4m3 (fp8_base, fp8_base_unet; arXiv 2209.05433): a byte a number, 3 bits of mantissa,
largest value 448; simple casting, without scales, as kohya-ss/sd-scripts has it (train_network.py
at 48d368fa). bfloat16 and float16: where the CPU cannot multiply them itself.

Linear and convolution layers are kept so; norms, biases and embeddings stay as they were. `weight`
remains as a placeholder of the layer's shape and working precision that takes no memory, so that
whoever asks for shape, dtype or device gets true answers. The weight that a layer casts up lives
until its backward pass, unless gradient checkpointing casts it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn


def is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a type itself, as oneDNN tells torch.compile; else
    PyTorch does it in plain loops, dozens of times slower.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False  # torch for Apple's processors: it lacks the functions below
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in a smaller type."""

    stored: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The linear map of the weight, cast up."""
        return F.linear(input, self.stored.to(self.weight.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with _kept_small(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class StoredConv2d(nn.Conv2d):
    """A convolution whose weight is stored in a smaller type."""

    stored: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the weight, cast up."""
        weight = self.stored.to(self.weight.dtype)
        output: Tensor = self._conv_forward(input, weight, self.bias)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with _kept_small(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def store_weights(layers: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Turns linear and convolution layers into ones that store `dtype`; their bytes afterwards."""
    total = 0
    for layer in layers:
        kinds: dict[type, type] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}
        if type(layer) not in kinds:
            continue
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        layer.register_buffer("stored", _round(weight.data, dtype), persistent=False)
        weight.data = _placeholder(weight.data)
        layer.__class__ = kinds[type(layer)]
        total += weight.numel() * dtype.itemsize
    return total


def names_of_stored(root: nn.Module) -> list[str]:
    """Parameters and buffers of such layers, which several processes need not share."""
    return [
        f"{name}.{part}"
        for name, module in root.named_modules()
        if isinstance(module, StoredLinear | StoredConv2d)
        for part in ("weight", "stored")
    ]


def _round(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype is dtype:
        return weight.detach()
    largest = torch.finfo(dtype).max
    return weight.detach().float().clamp(-largest, largest).to(dtype)


def _placeholder(like: Tensor) -> Tensor:
    """Zeros of a shape, without memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


@contextmanager
def _kept_small(layer: StoredLinear | StoredConv2d) -> Iterator[None]:
    """Around a move or a cast: the stored weight only changes its device, and is never copied to
    another type on the way; the placeholder follows."""
    kept = layer.stored
    layer.stored = kept.new_empty(0)
    try:
        yield
    finally:
        layer.stored = kept.to(layer.stored.device)
        layer.weight.data = _placeholder(layer.weight.data)
