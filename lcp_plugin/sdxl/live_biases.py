"""Changes of biases on a live model: b' = b_0 + d, always from untouched biases.

d is added in fp32 and rounded once, stochastically where biases are of half precision (as weights
are: `sdxl.rounding`). Vectors are small: however a delta is carried, they are added, never beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lcp_plugin.biases import Biases
from lcp_plugin.errors import LineageError
from lcp_plugin.sdxl.rounding import round_stochastically
from lcp_plugin.telling.wording import counted


class LiveBiases:
    """The biases of a model's layers, and what is added to them now."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._untouched: dict[str, Tensor] = {}
        self.changes = Biases()

    def set(self, changes: Biases) -> None:
        """Puts biases on b_0 + d. Raises LineageError where the base has no such bias."""
        if changes is self.changes or _same(changes, self.changes):
            return
        check_biases(self._layers, changes)
        for name, untouched in self._untouched.items():
            bias = bias_of(self._layers[name])
            bias.data = untouched.to(bias.device)
        self.changes, self._untouched = changes, {}
        for name, change in changes.items():
            self._untouched[name] = bias_of(self._layers[name]).data
            _add(name, self._layers[name], change)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Untouched biases for a while."""
        changes = self.changes
        try:
            self.set(Biases())
            yield
        finally:
            self.set(changes)


def add_biases(layers: Mapping[str, nn.Module], changes: Biases, what: str = "the parent") -> None:
    """Changes biases for good. Raises LineageError, as `check_biases`."""
    check_biases(layers, changes, what)
    for name, change in changes.items():
        _add(name, layers[name], change)


def check_biases(
    layers: Mapping[str, nn.Module], changes: Biases, what: str = "the parent"
) -> None:
    """Raises LineageError for a bias that the base does not have, or has in another length."""
    for name, change in changes.items():
        bias = getattr(layers.get(name), "bias", None)
        if bias is None:
            raise LineageError(
                f"{what} changes the bias of {name}, and this base has none there: it was made for "
                "another base."
            )
        if bias.shape != change.shape:
            raise LineageError(
                f"{what} changes the bias of {name} in {counted(len(change), 'place')}, this "
                f"base's has {len(bias)}: it was made for another base."
            )


def bias_of(layer: nn.Module) -> nn.Parameter:
    """The layer's bias as it is now."""
    bias = layer.bias
    assert isinstance(bias, nn.Parameter)
    return bias


def _add(name: str, layer: nn.Module, change: Tensor) -> None:
    bias = bias_of(layer)
    changed = bias.detach().float() + change.to(bias.device)
    bias.data = round_stochastically(changed, bias.dtype, f"{name}.bias")


def _same(one: Biases, other: Biases) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
