"""Changes of biases, and the whole change of a base: what runs beside the deltas.

A full or LoCon file of LyCORIS may change biases too (`diff_b`): b' = b + d. No task of ours trains
them; they come with a parent or with base_weights, and belong to what lies under the training.
Strategies neither see nor change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from lcp_plugin.adapter import _frozen, is_finite
from lcp_plugin.delta import Delta
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.telling.wording import counted


class Biases(Mapping[str, Tensor]):
    """Module name -> change of its bias (out,), fp32; read-only and sorted."""

    def __init__(self, changes: Mapping[str, Tensor] | None = None) -> None:
        frozen = {name: _frozen(change) for name, change in (changes or {}).items()}
        self._changes = MappingProxyType(dict(sorted(frozen.items())))

    def __getitem__(self, name: str) -> Tensor:
        return self._changes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def __add__(self, other: Biases) -> Biases:
        """The sum. Raises FileFormatError where a module has two lengths."""
        merged = dict(self)
        for name, change in other.items():
            if name in merged and merged[name].shape != change.shape:
                raise FileFormatError(
                    f"the bias of {name} is changed in {counted(len(merged[name]), 'place')} by "
                    f"one file and in {len(change)} by the other; they belong to different bases."
                )
            merged[name] = merged[name] + change if name in merged else change
        return Biases(merged)

    def weighted(self, weight: float) -> Biases:
        """weight * d; none for weight 0."""
        if weight == 0:
            return Biases()
        return self if weight == 1 else self.map(lambda change: change * weight)

    def map(self, edit: Callable[[Tensor], Tensor]) -> Biases:
        """Every change edited."""
        return Biases({name: edit(change) for name, change in self.items()})

    def restrict(self, names: Iterable[str]) -> Biases:
        """Only those of the modules in `names`."""
        wanted = set(names)
        return Biases({name: change for name, change in self.items() if name in wanted})

    def check_finite(self) -> None:
        """Raises NumericError naming the first module that holds NaN or infinity."""
        for name, change in self.items():
            if not is_finite(change):
                raise NumericError(
                    f"the bias change of {name} holds NaN or infinity; it is not used or saved."
                )


@dataclass(frozen=True)
class Change:
    """All that is added to a base: deltas to its weights, and changes of its biases."""

    delta: Delta = field(default_factory=Delta)
    biases: Biases = field(default_factory=Biases)

    def __add__(self, other: Change) -> Change:
        return Change(self.delta + other.delta, self.biases + other.biases)

    def __bool__(self) -> bool:
        return bool(self.delta) or bool(self.biases)

    def weighted(self, weight: float) -> Change:
        """Both times the weight."""
        return Change(self.delta.weighted(weight), self.biases.weighted(weight))

    def modules(self) -> list[str]:
        """The modules that change, in order."""
        return sorted({*self.delta, *self.biases})


def biases_to_tensors(biases: Biases, prefix: str) -> dict[str, Tensor]:
    """As tensors for a file: `<prefix><module>.bias`."""
    return {f"{prefix}{name}.bias": change for name, change in biases.items()}


def biases_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Biases:
    """What `biases_to_tensors` wrote; keys without the prefix are ignored."""
    named = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    return Biases({name.removesuffix(".bias"): change for name, change in named.items()})
