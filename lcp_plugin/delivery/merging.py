"""Merge adapters that were trained apart: pure functions on deltas, never on factors.

With D_i = w_i (alpha_i / r_i) B_i A_i, module by module (weights may be negative; they go into B):

    sum         sum_i D_i, exact, factors stacked: ranks and alphas of any kind
    magmax      entry by entry the D_i of largest magnitude, ties to the later (arXiv 2407.06322)
    ties        each D_i keeps its `density` largest entries; the sign with the larger total wins
                each entry; the mean of those that agree with it (arXiv 2306.01708)
    dare        each entry of each D_i is dropped with probability 1 - density, the rest divided by
                density; then the sum (arXiv 2311.03099)
    orthogonal  in the order given, each D_i loses what it does to inputs that an earlier one
                responds to: D_i (I - V V^T), V the right singular vectors of the sum so far that
                hold `energy` of it. Earlier adapters keep their behaviour on their own inputs; the
                rank of D_i does not grow

Adding factors, (B_1 + B_2)(A_1 + A_2), adds cross terms that no adapter ever had; it is not here.
Afterwards `rank` truncates each module optimally (QR and a small SVD, Eckart-Young), with the
relative error of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcp_plugin.biases import Biases
from lcp_plugin.delta import Delta, Dense, Entry, Stacked
from lcp_plugin.errors import ConfigError, FileFormatError, NumericError
from lcp_plugin.seeds import derive_seed
from lcp_plugin.telling.wording import counted

METHODS = ("sum", "magmax", "ties", "dare", "orthogonal")


@dataclass(frozen=True)
class MergeOptions:
    """How to merge."""

    method: str = "sum"
    density: float = 0.0  # ties, dare: share of entries kept; 0 is the method's own (.2, .5)
    energy: float = 1.0  # orthogonal: share of ||D||^2 whose inputs are protected
    scale: float = 1.0  # of the result; MagMax's and TIES' lambda
    rank: int = 0  # truncate to; 0: keep all
    seed: int = 0  # dare

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(
                f"method '{self.method}' is not known; use one of {', '.join(METHODS)}."
            )
        if not 0 <= self.density <= 1:
            problems.append(f"density {self.density} is no share; give a number from 0 to 1.")
        if not 0 < self.energy <= 1:
            problems.append(f"energy {self.energy} is no share; give a number above 0, up to 1.")
        if self.rank < 0:
            problems.append(f"rank {self.rank} is negative; 0 keeps all ranks.")
        if problems:
            raise ConfigError(*problems)

    @property
    def kept(self) -> float:
        """The density that holds."""
        return self.density or {"ties": 0.2}.get(self.method, 0.5)


@dataclass(frozen=True)
class Merged:
    """The result. What a truncation lost, per module; both empty without one."""

    delta: Delta
    errors: Mapping[str, float]  # relative, ||D - D'|| / ||D||
    sizes: Mapping[str, float]  # ||D||^2 before

    @property
    def error(self) -> float:
        """Relative error over all modules together."""
        lost = sum(self.sizes[name] * error**2 for name, error in self.errors.items())
        total = sum(self.sizes.values())
        return math.sqrt(lost / total) if total else 0.0


def merge_deltas(
    deltas: Sequence[Delta],
    weights: Sequence[float] | None = None,
    options: MergeOptions | None = None,
) -> Merged:
    """Merge deltas in the order given, module by module.

    Raises:
        ConfigError: nothing to merge, or another number of weights than deltas.
        FileFormatError: a module has different shapes in two of them.
    """
    options = options or MergeOptions()
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    weights = weights if options.scale else [0.0] * len(weights)
    if not deltas or len(weights) != len(deltas):
        adapters, given = counted(len(deltas), "adapter"), counted(len(weights), "weight")
        raise ConfigError(f"{adapters} and {given}; give one for each.")
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name in sorted(set().union(*deltas)):
        parts = [
            d[name].weighted(w) for d, w in zip(deltas, weights, strict=True) if name in d and w
        ]
        if not parts:
            continue
        for part in parts:
            check_range(Delta({name: part}))
        merged = Delta({name: merge_entries(name, parts, options)})
        if options.rank:  # at once, so that dense matrices do not pile up
            full = merged
            merged, error = full.truncate(options.rank)
            errors.update(error)
            sizes[name] = full[name].norm() ** 2
        check_range(merged)
        entries.update(merged)
    return Merged(Delta(entries), errors, sizes)


def check_range(weighted: Delta | Biases) -> None:
    """Raises ConfigError where weights have taken finite values beyond what fp32 holds."""
    try:
        weighted.check_finite()
    except NumericError as error:
        place = str(error).partition(" holds ")[0]
        raise ConfigError(
            f"{place} is beyond what 32-bit floats hold with these weights; give smaller ones."
        ) from None


def merge_biases(
    biases: Sequence[Biases], weights: Sequence[float], options: MergeOptions
) -> Biases:
    """Changes of biases by the same rule, a vector for a matrix; `orthogonal`, which is about
    inputs, sums them. No rank cuts them.
    """
    rule = replace(options, method="sum") if options.method == "orthogonal" else options
    merged: dict[str, Tensor] = {}
    for name in sorted(set().union(*biases)):
        parts = [
            Dense(given[name][:, None] * weight)  # (out, 1)
            for given, weight in zip(biases, weights, strict=True)
            if name in given and weight and rule.scale
        ]
        if parts:
            merged[name] = merge_entries(f"the bias of {name}", parts, rule).dense().flatten()
    changes = Biases(merged)
    check_range(changes)
    return changes


def merge_entries(name: str, parts: Sequence[Entry], options: MergeOptions) -> Entry:
    """One module of a merge; `parts` carry their weights and are in order."""
    for part in parts[1:]:
        if part.shape != parts[0].shape:
            raise FileFormatError(
                f"{name} is {parts[0].shape} in one adapter and {part.shape} in another; they "
                "belong to different bases."
            )
    merged = _METHODS[options.method](name, parts, options)
    return merged if options.scale == 1 else merged.weighted(options.scale)


def _sum(name: str, parts: Sequence[Entry], _: MergeOptions) -> Entry:
    total = Delta({name: parts[0]})
    for part in parts[1:]:
        total = total + Delta({name: part})
    return total[name]


def _magmax(name: str, parts: Sequence[Entry], _: MergeOptions) -> Entry:
    best = Delta({name: parts[0]})
    for part in parts[1:]:
        best = Delta({name: part}).select_by_magnitude(best)
    return best[name]


def _ties(name: str, parts: Sequence[Entry], options: MergeOptions) -> Entry:
    trimmed = [keep_largest(part.dense(), options.kept) for part in parts]
    elected = torch.stack(trimmed).sum(0).sign()  # (out, in)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for matrix in trimmed:
        agrees = (matrix.sign() == elected) & (matrix != 0)
        total += torch.where(agrees, matrix, 0.0)
        count += agrees
    return Dense(total / count.clamp_min(1), parts[0].kernel)


def _dare(name: str, parts: Sequence[Entry], options: MergeOptions) -> Entry:
    total = torch.zeros(parts[0].shape)
    for i, part in enumerate(parts):
        generator = torch.Generator().manual_seed(derive_seed(options.seed, "dare", name, i))
        kept = torch.rand(part.shape, generator=generator) < options.kept
        total += torch.where(kept, part.dense() / options.kept, 0.0)
    return Dense(total, parts[0].kernel)


def _orthogonal(name: str, parts: Sequence[Entry], options: MergeOptions) -> Entry:
    total = parts[0]
    for part in parts[1:]:
        rows = row_basis(total, options.energy)  # (k, in)
        total = _sum(name, [total, project_inputs(part, rows)], options)
    return total


_METHODS: dict[str, Callable[[str, Sequence[Entry], MergeOptions], Entry]] = {
    "sum": _sum,
    "magmax": _magmax,
    "ties": _ties,
    "dare": _dare,
    "orthogonal": _orthogonal,
}


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """`matrix` with all but its `density` largest entries set to 0; equal magnitudes are kept."""
    keep = max(1, round(density * matrix.numel()))
    if keep >= matrix.numel():
        return matrix
    threshold = matrix.abs().flatten().kthvalue(matrix.numel() - keep + 1).values
    return torch.where(matrix.abs() >= threshold, matrix, 0.0)


def row_basis(entry: Entry, energy: float = 1.0) -> Tensor:
    """Orthonormal rows (k, in) that span the inputs D responds to, holding `energy` of ||D||^2."""
    if isinstance(entry, Stacked):
        q, r = torch.linalg.qr(entry.down.double().T)  # D = (B R^T) Q^T
        _, s, vh = torch.linalg.svd(entry.up.double() @ r.T, full_matrices=False)
        vh = vh @ q.T
    else:
        _, s, vh = torch.linalg.svd(entry.dense().double(), full_matrices=False)
    power = s.square()
    if not float(power.sum()):
        return torch.zeros(0, entry.shape[1])
    if energy >= 1:
        keep = int((s > s[0] * 1e-6 * max(entry.shape) ** 0.5).sum())
    else:
        held = power.cumsum(0) / power.sum()
        keep = int((held < energy).sum()) + 1
    rows: Tensor = vh[:keep].float()
    return rows


def project_inputs(entry: Entry, rows: Tensor) -> Entry:
    """D (I - V^T V) for orthonormal rows V (k, in); a stacked D keeps its rank."""
    if isinstance(entry, Stacked):
        down = entry.down.double()
        rest = down - (down @ rows.double().T) @ rows.double()
        return Stacked(entry.up, rest.float(), entry.blocks, entry.kernel)
    matrix = entry.dense().double()
    return Dense((matrix - (matrix @ rows.double().T) @ rows.double()).float(), entry.kernel)
