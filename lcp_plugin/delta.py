"""A delta: the change of the base weights, module by module, in fp32.

D = sum_t scale_t B_t A_t. Held as stacked factors, up = [s_1 B_1 | s_2 B_2 | ...] and
down = [A_1; A_2; ...], while that is smaller than the matrix itself: exact, and ranks add up.
Otherwise dense. Factors are never added, deltas are; weights of a merge go into B only. Addition
and MagMax's selection (arXiv 2407.06322) are all that the strategies need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, Factors, Kernel, _frozen, is_finite
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.lora import (
    compute_update,
    select_by_magnitude,
    truncate_dense,
    truncate_factors,
)


@dataclass(frozen=True)
class Stacked:
    """D = up @ down with every scale folded into up. `blocks` are the ranks of the updates
    stacked, oldest first.
    """

    up: Tensor  # (out, R), fp32
    down: Tensor  # (R, in), fp32
    blocks: tuple[int, ...]
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.down.shape[0] or sum(self.blocks) != self.down.shape[0]:
            raise FileFormatError(
                f"a stacked delta of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} "
                f"with blocks "
                f"{self.blocks} does not fit together."
            )
        object.__setattr__(self, "up", _frozen(self.up))
        object.__setattr__(self, "down", _frozen(self.down))

    @property
    def rank(self) -> int:
        """All ranks together."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """up @ down   # (out, in), fp32."""
        return compute_update(self.up, self.down)

    def weighted(self, weight: float) -> Stacked:
        """weight * D, the weight in B only."""
        return Stacked(self.up * weight, self.down, self.blocks, self.kernel)

    def norm(self) -> float:
        """||D||_F by the Gram matrices of the factors, in fp64."""
        up, down = self.up.double(), self.down.double()
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


@dataclass(frozen=True)
class Dense:
    """D as a matrix."""

    weight: Tensor  # (out, in), fp32
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _frozen(self.weight))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself; not to be written to."""
        return self.weight

    def weighted(self, weight: float) -> Dense:
        """weight * D."""
        return Dense(self.weight * weight, self.kernel)

    def norm(self) -> float:
        """||D||_F in fp64."""
        return float(self.weight.double().norm())


Entry = Stacked | Dense


def stacking_pays(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank are smaller than the (out, in) matrix."""
    return rank * (shape[0] + shape[1]) < shape[0] * shape[1]


def _settle(entry: Stacked) -> Entry:
    if stacking_pays(entry.rank, entry.shape):
        return entry
    return Dense(entry.dense(), entry.kernel)


def _check_shapes(name: str, a: Entry, b: Entry) -> None:
    if a.shape != b.shape:
        raise FileFormatError(
            f"{name} has shape {a.shape} in one delta and {b.shape} in the other; they belong to "
            f"different bases."
        )


def _add(name: str, a: Entry, b: Entry) -> Entry:
    _check_shapes(name, a, b)
    kernel = a.kernel or b.kernel
    if isinstance(a, Stacked) and isinstance(b, Stacked):
        return _settle(
            Stacked(
                torch.cat([a.up, b.up], dim=1),
                torch.cat([a.down, b.down], dim=0),
                a.blocks + b.blocks,
                kernel,
            )
        )
    return Dense(a.dense() + b.dense(), kernel)


def entry_of(factors: Factors) -> Entry:
    """One module's update as an entry: stacked with its scale in B, dense where that is smaller."""
    return _settle(
        Stacked(factors.up * factors.scale, factors.down, (factors.rank,), factors.kernel)
    )


class Delta(Mapping[str, Entry]):
    """Module name -> Stacked or Dense, read-only and sorted; any other module's change is 0."""

    def __init__(self, entries: Mapping[str, Entry] | None = None) -> None:
        self._entries = MappingProxyType(dict(sorted((entries or {}).items())))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def of(cls, adapter: Adapter | None) -> Delta:
        """scale * B A of every module; nothing for None."""
        return cls({name: entry_of(factors) for name, factors in (adapter or {}).items()})

    def __add__(self, other: Delta) -> Delta:
        """The exact sum in weight space; `self` is the older part."""
        merged: dict[str, Entry] = dict(self)
        for name, entry in other.items():
            merged[name] = _add(name, merged[name], entry) if name in merged else entry
        return Delta(merged)

    def weighted(self, weight: float) -> Delta:
        """weight * D; an empty delta for weight 0."""
        if weight == 0:
            return Delta()
        return self if weight == 1 else Delta({n: e.weighted(weight) for n, e in self.items()})

    def select_by_magnitude(self, older: Delta) -> Delta:
        """Entry by entry the larger of self (the newest; it wins ties) and `older`; dense where
        both change a module.

        A module that only one of them changes stays in that one's form: |0| >= |d| holds only where
        d is 0.
        """
        merged: dict[str, Entry] = dict(older)
        for name, entry in self.items():
            if name not in older:
                merged[name] = entry
                continue
            _check_shapes(name, entry, older[name])
            chosen = select_by_magnitude(entry.dense(), older[name].dense())
            merged[name] = Dense(chosen, entry.kernel or older[name].kernel)
        return Delta(merged)

    def restrict(self, names: Iterable[str]) -> Delta:
        """Only the modules in `names`."""
        wanted = set(names)
        return Delta({name: entry for name, entry in self.items() if name in wanted})

    def norm(self) -> float:
        """||D||_F over all modules together."""
        return math.sqrt(sum(entry.norm() ** 2 for entry in self.values()))

    def nbytes(self) -> int:
        """Bytes of all tensors in fp32."""
        return 4 * sum(
            e.up.numel() + e.down.numel() if isinstance(e, Stacked) else e.weight.numel()
            for e in self.values()
        )

    def check_finite(self) -> None:
        """Raises NumericError naming the first module that holds NaN or infinity."""
        for name, e in self.items():
            tensors = (e.up, e.down) if isinstance(e, Stacked) else (e.weight,)
            if not all(is_finite(t) for t in tensors):
                raise NumericError(
                    f"the delta of {name} holds NaN or infinity; it is not used or saved."
                )

    def truncate(self, rank: int) -> tuple[Delta, dict[str, float]]:
        """The best delta of at most `rank` in each module, and the errors ||D - D'|| / ||D||.

        Norms are Frobenius'. Entries of a lower rank stay as they are (error 0). A rank at which
        factors no longer pay keeps the matrix.
        """
        entries: dict[str, Entry] = {}
        errors: dict[str, float] = {}
        for name, entry in self.items():
            limit = entry.rank if isinstance(entry, Stacked) else min(entry.shape)
            if limit <= rank:
                entries[name], errors[name] = entry, 0.0
                continue
            if isinstance(entry, Stacked):
                up, down, error = truncate_factors(entry.up, entry.down, rank)
            else:
                up, down, error = truncate_dense(entry.weight, rank)
            entries[name] = Stacked(up, down, (down.shape[0],), entry.kernel)
            errors[name] = error
        return Delta(entries), errors

    def overall_error(self, errors: Mapping[str, float]) -> float:
        """||D - D'||_F / ||D||_F of a truncation from its per-module errors."""
        norms = {name: entry.norm() ** 2 for name, entry in self.items()}
        total = sum(norms.values())
        lost = sum(norms[name] * errors.get(name, 0.0) ** 2 for name in norms)
        return math.sqrt(lost / total) if total > 0 else 0.0

    def factors(self, name: str, identity: Callable[[int], Tensor] = torch.eye) -> Factors:
        """A module as an exact LoRA of its true rank, alpha = rank; identity x D if it is dense."""
        entry = self[name]
        if isinstance(entry, Stacked):
            return Factors(entry.down, entry.up, float(entry.rank), entry.kernel)
        out, inputs = entry.shape
        if inputs <= out:
            return Factors(identity(inputs), entry.weight, float(inputs), entry.kernel)
        return Factors(entry.weight, identity(out), float(out), entry.kernel)

    def as_adapter(self) -> Adapter:
        """Every module as an exact LoRA (`factors`): what a deliverable holds.

        Dense modules of one size share their identity: at SDXL's sizes they would be 3 GB.
        """
        identity = lru_cache(maxsize=None)(torch.eye)
        return Adapter({name: self.factors(name, identity) for name in self})


def delta_to_tensors(delta: Delta, prefix: str) -> dict[str, Tensor]:
    """A delta as tensors for a file: `<prefix><module>.up | .down | .blocks | .dense | .kernel`."""
    tensors: dict[str, Tensor] = {}
    for name, entry in delta.items():
        key = prefix + name
        if isinstance(entry, Stacked):
            tensors[f"{key}.up"], tensors[f"{key}.down"] = entry.up, entry.down
            tensors[f"{key}.blocks"] = torch.tensor(entry.blocks, dtype=torch.int64)
        else:
            tensors[f"{key}.dense"] = entry.weight
        if entry.kernel is not None:
            tensors[f"{key}.kernel"] = torch.tensor(entry.kernel, dtype=torch.int64)
    return tensors


def delta_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Delta:
    """The delta that `delta_to_tensors` wrote; keys without the prefix are ignored.

    Raises:
        FileFormatError: a part of a module is missing or does not fit.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name, _, part = key[len(prefix) :].rpartition(".")
            modules.setdefault(name, {})[part] = tensor
    entries: dict[str, Entry] = {}
    for name, parts in modules.items():
        kernel = _read_kernel(parts.get("kernel"))
        if "dense" in parts:
            entries[name] = Dense(parts["dense"], kernel)
        elif {"up", "down", "blocks"} <= parts.keys():
            blocks = tuple(int(b) for b in parts["blocks"])
            entries[name] = Stacked(parts["up"], parts["down"], blocks, kernel)
        else:
            raise FileFormatError(
                f"the delta of {name} holds {sorted(parts)}; wanted dense, or up, down and blocks."
            )
    return Delta(entries)


def adapter_to_tensors(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    """An adapter as named tensors: `<prefix><module>.up | .down | .alpha (fp64) | .kernel`."""
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.items():
        key = prefix + name
        tensors[f"{key}.up"], tensors[f"{key}.down"] = factors.up, factors.down
        tensors[f"{key}.alpha"] = torch.tensor(factors.alpha, dtype=torch.float64)
        if factors.kernel is not None:
            tensors[f"{key}.kernel"] = torch.tensor(factors.kernel, dtype=torch.int64)
    return tensors


def adapter_from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Adapter:
    """The adapter that `adapter_to_tensors` wrote; keys without the prefix are ignored.

    Raises:
        FileFormatError: a module lacks one of its tensors.
    """
    modules = {k[len(prefix) :].rpartition(".")[0] for k in tensors if k.startswith(prefix)}
    try:
        return Adapter(
            {
                name: Factors(
                    tensors[f"{prefix}{name}.down"],
                    tensors[f"{prefix}{name}.up"],
                    float(tensors[f"{prefix}{name}.alpha"]),
                    _read_kernel(tensors.get(f"{prefix}{name}.kernel")),
                )
                for name in modules
            }
        )
    except KeyError as error:
        raise FileFormatError(f"an adapter in the file lacks its tensor {error}.") from error


def _read_kernel(tensor: Tensor | None) -> Kernel | None:
    return None if tensor is None else (int(tensor[0]), int(tensor[1]))
