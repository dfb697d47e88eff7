"""What collides when adapters are merged or learned one after another, measured on the weights.

Opposed parameters (arXiv 2410.04891, figure 2): a = W_i - W_{i-1}, the change made by task i;
b = W_j - W_{i-1} for j > i, what became of it (reading `since`, which contains task i's own
change), or b = W_j - W_i (reading `after`, only what came later); m = [sign a != sign b];

    ratio = ||b * m|| / ||a||,  opposed = share of entries with a * b < 0,
    zeros = share of entries where a or b is exactly 0 (they count as sign 0 in m)

over all matrices together and per block. For adapters trained apart a and b are their updates.

Overlap of two updates' row spaces (the inputs that they respond to) and column spaces (the outputs
that they write): ||V_a V_b^T||_F^2 / min(k_a, k_b) with orthonormal bases, 1 when one contains the
other; random spaces of rank r in n dimensions have r / n.

Modules are read one at a time; a run's carries that are not on disk are rebuilt into a temporary
folder first, so memory holds one carry at most.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.delivery.merging import Merged
from lcp_plugin.delta import Delta, Dense, Entry, Stacked
from lcp_plugin.errors import FileFormatError, TaskFolderError
from lcp_plugin.formats.tensors import TensorReader, write_tensors
from lcp_plugin.store.carries import carry_from_tensors, carry_to_tensors
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.telling.wording import counted

ModuleUpdates = Callable[[str], Delta]  # module -> its delta alone, empty if unchanged
READINGS = ("since", "after")
BASIS = 64  # directions of a dense update that count for its overlap


# ------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Opposition:
    """Sums over entries; two of them add up."""

    opposed_energy: float = 0.0  # ||b * m||^2
    energy: float = 0.0  # ||a||^2
    negative: int = 0  # a * b < 0
    zeros: int = 0  # a = 0 or b = 0
    entries: int = 0

    def __add__(self, other: Opposition) -> Opposition:
        """Both together."""
        return Opposition(
            self.opposed_energy + other.opposed_energy,
            self.energy + other.energy,
            self.negative + other.negative,
            self.zeros + other.zeros,
            self.entries + other.entries,
        )

    def to_json(self) -> dict[str, float | None]:
        """ratio, opposed and zeros; None where there is nothing to divide by."""
        count = self.entries or None
        return {
            "ratio": math.sqrt(self.opposed_energy / self.energy) if self.energy else None,
            "opposed": self.negative / count if count else None,
            "zeros": self.zeros / count if count else None,
        }


def measure_opposition(a: Tensor, b: Tensor) -> Opposition:
    """Of two changes of one matrix, (out, in) each."""
    signs = a.sign().mul_(b.sign())
    opposed = b.masked_fill(signs > 0, 0.0)  # where both are 0, b weighs nothing
    return Opposition(
        opposed_energy=_energy(opposed),
        energy=_energy(a),
        negative=int((signs < 0).sum()),
        zeros=int((signs == 0).sum()),
        entries=a.numel(),
    )


def _energy(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def measure_overlap(a: Entry, b: Entry) -> tuple[float, float]:
    """(row, column) space overlap of two updates, 0 to 1; 0 where one of them is zero."""
    rows = _overlap(_basis(a, inputs=True), _basis(b, inputs=True))
    return rows, _overlap(_basis(a, inputs=False), _basis(b, inputs=False))


def _overlap(a: Tensor, b: Tensor) -> float:
    smaller = min(a.shape[1], b.shape[1])
    return float((a.T @ b).square().sum()) / smaller if smaller else 0.0


def _basis(entry: Entry, inputs: bool) -> Tensor:
    """Orthonormal columns (n, k) of the row space (or column space) of D."""
    if isinstance(entry, Stacked):
        factor = entry.down.T if inputs else entry.up  # (n, R)
    else:
        factor = _strongest(entry.dense().T if inputs else entry.dense())
    u, s, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    keep = int((s > (s[0] if s.numel() else 0.0) * 1e-6).sum())
    basis: Tensor = u[:, :keep]
    return basis


def _strongest(matrix: Tensor) -> Tensor:
    """About the BASIS strongest columns' directions of a matrix, by two power iterations."""
    generator = torch.Generator().manual_seed(0)
    k = min(BASIS, *matrix.shape)
    found = matrix @ torch.randn(matrix.shape[1], k, generator=generator)
    for _ in range(2):
        found = matrix @ (matrix.T @ torch.linalg.qr(found).Q)
    return found


def block_of(module: str) -> str:
    """The block that a module is counted in: `unet.down_blocks.1`, `text_encoder`, ..."""
    match = re.match(r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)", module)
    return match[0] if match else module.split(".", 1)[0]


# ----------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Pair:
    """How much `second` opposes `first`, per block and overall (block "")."""

    first: str
    second: str
    reading: str
    blocks: Mapping[str, Opposition] = field(default_factory=dict)
    overlaps: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (rows, columns)

    def to_json(self) -> dict[str, Any]:
        """Names, the overall figures, and those of each block."""
        table = {
            block: {
                **opposition.to_json(),
                "row_overlap": self.overlaps.get(block, (None, None))[0],
                "column_overlap": self.overlaps.get(block, (None, None))[1],
            }
            for block, opposition in self.blocks.items()
        }
        names = {"first": self.first, "second": self.second, "reading": self.reading}
        return {**names, **table.pop("", {}), "blocks": table}


class _Tally:
    """Adds up one pair, module by module."""

    def __init__(self, first: str, second: str, reading: str) -> None:
        self.pair = Pair(first, second, reading)
        self.blocks: dict[str, Opposition] = {}
        self.overlaps: dict[str, list[tuple[float, float]]] = {}

    def add(self, module: str, a: Entry, b: Entry, overlap: bool) -> None:
        """One module in which at least one of the two changes something."""
        found = measure_opposition(a.dense(), b.dense())
        shared = measure_overlap(a, b) if overlap else None
        for block in ("", block_of(module)):
            self.blocks[block] = self.blocks.get(block, Opposition()) + found
            if shared:
                self.overlaps.setdefault(block, []).append(shared)

    def done(self) -> Pair:
        """The pair; overlaps are means over modules."""
        means = {
            block: (sum(r for r, _ in pairs) / len(pairs), sum(c for _, c in pairs) / len(pairs))
            for block, pairs in self.overlaps.items()
        }
        return replace(self.pair, blocks=dict(sorted(self.blocks.items())), overlaps=means)


def _nothing_like(*entries: Entry | None) -> Dense:
    shape = next(e.shape for e in entries if e is not None)
    return Dense(torch.zeros(shape))


def compare_adapters(deltas: Mapping[str, Delta]) -> list[Pair]:
    """Every pair of adapters trained apart, in the order given: a and b are their updates."""
    names = list(deltas)
    tallies = {
        (i, j): _Tally(names[i], names[j], "apart")
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    for module in sorted(set().union(*deltas.values())):
        for (i, j), tally in tallies.items():
            a, b = deltas[names[i]].get(module), deltas[names[j]].get(module)
            if a is not None or b is not None:
                a, b = a or _nothing_like(b), b or _nothing_like(a)
                if a.shape != b.shape:
                    raise FileFormatError(
                        f"{module} is {a.shape} in {names[i]} and {b.shape} in {names[j]}; they "
                        "belong to different bases."
                    )
                tally.add(module, a, b, overlap=True)
    return [tally.done() for tally in tallies.values()]


def compare_boundaries(
    names: Sequence[str], boundaries: Sequence[ModuleUpdates], modules: Sequence[str]
) -> list[Pair]:
    """Figure 2: every earlier task i against every later boundary j, in both readings.

    Args:
        names: of the tasks, T of them.
        boundaries: D_0 (what the run started from), D_1, ..., D_T, read by module.
    """
    later = [(i, j) for i in range(1, len(names) + 1) for j in range(i + 1, len(names) + 1)]
    tallies = {
        (i, j, reading): _Tally(names[i - 1], names[j - 1], reading)
        for i, j in later
        for reading in READINGS
    }
    for module in _shown(modules):
        at = [read(module).get(module) for read in boundaries]
        if all(entry is None for entry in at):
            continue
        dense = [(entry or _nothing_like(*at)).dense() for entry in at]
        for i, j in later:
            a = Dense(dense[i] - dense[i - 1])
            for reading, start in zip(READINGS, (i - 1, i), strict=True):
                b = Dense(dense[j] - dense[start])
                tallies[i, j, reading].add(module, a, b, overlap=False)
    return [tally.done() for tally in tallies.values()]


def _shown(modules: Sequence[str]) -> Iterator[str]:
    """The modules, with a bar on a terminal: SDXL's take minutes."""
    from tqdm import tqdm

    yield from tqdm(modules, desc="comparing", unit="module", leave=False, disable=None)


def energy_lost(merged: Merged) -> dict[str, float]:
    """Share of ||D||^2 that a truncated merge lost, per block; overall under ""."""
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for name, size in merged.sizes.items():
        for block in ("", block_of(name)):
            total[block] = total.get(block, 0.0) + size
            lost[block] = lost.get(block, 0.0) + size * merged.errors[name] ** 2
    return {block: lost[block] / total[block] if total[block] else 0.0 for block in sorted(total)}


# ----------------------------------------------------------------------------------------- runs


@contextmanager
def open_boundaries(run: Path) -> Iterator[tuple[list[str], list[ModuleUpdates], list[str]]]:
    """(task names, D_0 .. D_T by module, modules) of a run's folder, without holding them.

    Raises:
        LineageError: fewer than two complete tasks, or carries that cannot be rebuilt.
    """
    store = RunStore(run.parent, run.name)
    folders = store.folders()
    if len(folders) < 2:
        raise TaskFolderError(
            f"{run} holds {counted(len(folders), 'complete task')}; a comparison needs two. For "
            "LoRA files name the files."
        )
    with tempfile.TemporaryDirectory(prefix="lcp_conflicts_") as temporary:
        carries: list[Path | None] = []
        if (store.root / "parent" / "carry.safetensors").is_file():
            carries.append(store.root / "parent" / "carry.safetensors")
        else:
            carries.append(None)
        replay = store.replay()
        for position, folder in enumerate(folders):
            file = folder.carry_file
            if not file.is_file():
                carry = replay.carry_behind(position)
                file = Path(temporary) / f"{folder.index}.safetensors"
                write_tensors(file, carry_to_tensors(carry))
            carries.append(file)
        readers = [_reader(file) for file in carries]
        modules = sorted(set().union(*(names for names, _ in readers)))
        yield [folder.name for folder in folders], [read for _, read in readers], modules


def _reader(file: Path | None) -> tuple[set[str], ModuleUpdates]:
    if file is None:
        return set(), lambda module: Delta()
    reader = TensorReader(file)
    tensors: dict[str, list[str]] = {}
    for name in reader.header.tensors:
        if name.startswith("bias/"):
            continue  # changes of biases are not compared
        module = name.partition("/")[2].rpartition(".")[0]
        tensors.setdefault(module, []).append(name)

    def read(module: str) -> Delta:
        parts = {name: reader.read(name) for name in tensors.get(module, ())}
        return carry_from_tensors(parts, ()).total

    return set(tensors), read


def figure_two(names: Sequence[str], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The first task against every later one: [{task, ratios: {reading: ratio}, ...}]."""
    rows: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if pair.first == names[0]:
            whole = pair.blocks.get("", Opposition()).to_json()
            row = rows.setdefault(
                pair.second, {"task": pair.second, "ratios": {}, "opposed": {}, "zeros": {}}
            )
            row["ratios"][pair.reading] = whole["ratio"] or 0.0
            row["opposed"][pair.reading] = whole["opposed"] or 0.0
            row["zeros"][pair.reading] = whole["zeros"] or 0.0
    return list(rows.values())
