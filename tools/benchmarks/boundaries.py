"""What happens between two tasks, on all adapted matrices of a size: start, fuse, merge, truncate.

Weights and factors are synthetic (normal, std .03 and .01), shapes are the real ones. Ours are the
functions that a run calls; a baseline is named in each row's note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, Timing, alternate, peak_mb, row_of, time_once
from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.config.estimates import ATTENTION_SHAPES
from lcp_plugin.delta import Delta, Stacked
from lcp_plugin.formats.precisions import PRECISIONS
from lcp_plugin.lora import orthogonal_columns, truncate_factors
from lcp_plugin.sdxl.layers import choose_targets, find_layers, layer_shape
from lcp_plugin.sdxl.sites import Site
from lcp_plugin.sdxl.stored import is_native

RANKS = {"sdxl": 64, "topo": 64, "tiny": 16}  # such that factors are smaller than matrices
PARTS = {"sdxl": 1, "topo": 16}  # at topo's size one of SDXL's matrices in so many
Shape = tuple[int, int]  # (out, in)
FUSE_BAR, ORTHOGONAL_BAR, TRUNCATE_BAR = 1.5, 1 / 50, 1 / 50  # at SDXL's shapes
EXCESS_BAR = 1.0 + 1e-4  # of the optimal error


@dataclass(frozen=True)
class Matrices:
    """The adapted matrices of a model."""

    size: str
    shapes: tuple[Shape, ...]
    parts: int = 1  # these are one matrix in so many

    @property
    def label(self) -> str:
        """Words for the table."""
        whole = "tiny" if self.size == "tiny" else "SDXL shapes"
        return whole if self.parts == 1 else f"{whole} (1/{self.parts})"

    @property
    def kinds(self) -> Mapping[Shape, int]:
        """Shape -> how many there are."""
        return Counter(self.shapes)

    @property
    def rank(self) -> int:
        """Of the synthetic adapters."""
        return RANKS[self.size]

    def bar(self, value: float) -> float | None:
        """A bar that is meant for SDXL's shapes."""
        return None if self.size == "tiny" else value

    def names(self) -> list[str]:
        """One module name for each, as SDXL's mid block would have it."""
        block = "unet.mid_block.attentions.0.transformer_blocks"
        parts = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
        return [f"{block}.{i // 4}.{parts[i % 4]}" for i in range(len(self.shapes))]

    def adapter(self, rank: int, seed: int) -> Adapter:
        """Synthetic factors for every matrix."""
        generator = torch.Generator().manual_seed(seed)
        return Adapter(
            {
                name: Factors(
                    torch.randn(rank, inputs, generator=generator) * 0.01,
                    torch.randn(out, rank, generator=generator) * 0.01,
                    float(rank),
                )
                for name, (out, inputs) in zip(self.names(), self.shapes, strict=True)
            }
        )


def matrices_of(size: str) -> Matrices:
    """`sdxl`: its 560 shapes; `topo`: every 16th of them; `tiny`: the embedded base's own."""
    if size in PARTS:
        shapes = [(out, inputs) for n, out, inputs in ATTENTION_SHAPES for _ in range(n)]
        return Matrices(size, tuple(shapes[:: PARTS[size]]), PARTS[size])
    from benchmarks.steps import load_size

    layers = find_layers({"unet": load_size(size).unet})
    shapes = [layer_shape(layers[name]) for name in choose_targets(layers, "attention")]
    return Matrices(size, tuple(shapes))


def measure_orthogonal(matrices: Matrices, rounds: int = 3, columns: int = 8) -> list[Row]:
    """Row: an orthogonal start of all A's against one SVD per column."""
    adapter = matrices.adapter(matrices.rank, 1)
    downs = [f.down for f in adapter.values()]

    def ours() -> None:
        for down in downs:
            orthogonal_columns(down)

    def per_column() -> None:  # a few columns of one A of each width
        for width in {down.shape[1]: down for down in downs}.values():
            for i in range(columns):
                torch.linalg.svd(width[:, i].view(1, -1))

    widths = len({down.shape[1] for down in downs})
    share = sum(down.shape[1] for down in downs) / (widths * columns)
    mine, theirs = alternate(ours, per_column, rounds)
    note = f"per-column SVD; {widths * columns} columns, extrapolated x {share:.0f}"
    name = f"orthogonal start, {matrices.label}, {len(downs)} matrices"
    return [
        row_of(
            name,
            mine,
            theirs * share,
            bar=matrices.bar(ORTHOGONAL_BAR),
            note=note,
            peak_mb=peak_mb(),
        )
    ]


# ------------------------------------------------------------------------------------- fusing


def measure_fuse(matrices: Matrices, rounds: int = 3) -> list[Row]:
    """Rows: the exact fuse of a stacked delta into all matrices, fp32 and bf16 base."""
    rows = []
    entries = [
        e for e in Delta.of(matrices.adapter(matrices.rank, 2)).values() if isinstance(e, Stacked)
    ]
    dense = len(matrices.shapes) - len(entries)
    for word in ("fp32", "bf16"):
        dtype = PRECISIONS[word]
        sites = [_site(e.shape, dtype) for e in entries]
        name = f"exact fuse, {matrices.label}, {word} base"
        passes = _addmm_passes(sites, entries, dtype, matrices.bar(FUSE_BAR))
        if matrices.size == "sdxl" and not is_native(dtype):
            passes = passes[:1]  # the others would take minutes here
        for label, baseline, bar in passes:
            mine, theirs = alternate(partial(_fuse_all, sites, entries), baseline, rounds)
            note = label + (f"; {dense} matrices too small to stack left out" if dense else "")
            rows.append(row_of(name, mine, theirs, bar=bar, note=note, peak_mb=peak_mb()))
        measured = partial(_fuse_all, sites, entries, True)
        mine, theirs = alternate(measured, partial(_fuse_all, sites, entries), 1)
        note = "what a boundary does; the fuse alone"
        rows.append(row_of(f"{name}, its rounding share measured", mine, theirs, note=note))
    return rows


def _site(shape: Shape, dtype: torch.dtype) -> Site:
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
    return Site("bench", layer)


def _fuse_all(sites: Sequence[Site], entries: Sequence[Stacked], measure: bool = False) -> None:
    for site, entry in zip(sites, entries, strict=True):
        site.fuse(entry, measure)
        site.restore()


def _addmm_passes(
    sites: Sequence[Site], entries: Sequence[Stacked], dtype: torch.dtype, bar: float | None
) -> list[tuple[str, Callable[[], None], float | None]]:
    """(what it is, the pass, the bar): addmm with fp32 factors, and bf16's own where that is."""

    def in_fp32() -> None:
        for site, entry in zip(sites, entries, strict=True):
            torch.addmm(site.weight.data.float(), entry.up, entry.down)

    passes: list[tuple[str, Callable[[], None], float | None]] = [
        ("one addmm in fp32 over the same matrices", in_fp32, bar)
    ]
    if dtype is not torch.float32:
        halves = [(e.up.to(dtype), e.down.to(dtype)) for e in entries]

        def in_half() -> None:
            for site, (up, down) in zip(sites, halves, strict=True):
                torch.addmm(site.weight.data, up, down)

        passes.append(("one addmm in bf16, factors rounded too: not exact", in_half, None))
    return passes


# ----------------------------------------------------------------------- merging and truncating


def measure_merge(matrices: Matrices, rounds: int = 3) -> list[Row]:
    """Row: two deltas added, in factors against as matrices."""
    one, two = (Delta.of(matrices.adapter(matrices.rank, seed)) for seed in (3, 4))

    def as_matrices() -> None:
        for name, entry in one.items():
            torch.add(entry.dense(), two[name].dense())

    mine, theirs = alternate(lambda: one + two, as_matrices, rounds)
    name = f"exact merge of two rank {matrices.rank}, {matrices.label}"
    note = "both formed as matrices and added"
    return [row_of(name, mine, theirs, note=note, peak_mb=peak_mb())]


def measure_truncation(matrices: Matrices, rounds: int = 3) -> list[Row]:
    """Row: rank 128 to 64 in every matrix against a dense SVD of each, errors compared."""
    delta = Delta.of(matrices.adapter(2 * matrices.rank, 5))
    entries = [e for e in delta.values() if isinstance(e, Stacked)]
    if not entries:
        return []
    samples = {e.shape: e for e in entries}
    counts = Counter(e.shape for e in entries)
    rank, worst = matrices.rank, 0.0

    def ours() -> None:
        for entry in entries:
            truncate_factors(entry.up, entry.down, rank)

    theirs = Timing(0.0, 0.0)
    for shape, entry in samples.items():  # one matrix of each shape stands for all of it
        matrix = entry.dense()
        cost = time_once(partial(torch.linalg.svd, matrix, full_matrices=False))
        theirs = Timing(
            theirs.cpu + cost.cpu * counts[shape], theirs.wall + cost.wall * counts[shape]
        )
        worst = max(worst, _excess(entry, matrix, rank))
    ours()
    timings = [time_once(ours) for _ in range(rounds)]
    mine = sorted(timings, key=lambda t: t.cpu)[rounds // 2]
    name = f"truncate rank {2 * rank} to {rank}, {matrices.label}, {len(entries)} matrices"
    note = f"dense SVD of one matrix a shape, extrapolated; error / optimum - 1 <= {worst:.0e}"
    label = f"error of truncation to {rank}, {matrices.label}, worst matrix"
    words = "error against the best of that rank, by SVD in fp64"
    return [
        row_of(name, mine, theirs, bar=matrices.bar(TRUNCATE_BAR), note=note, peak_mb=peak_mb()),
        Row(label, 1.0 + worst, 1.0, "x optimum", bar=EXCESS_BAR, note=words),
    ]


def _excess(entry: Stacked, matrix: Tensor, rank: int) -> float:
    """How far the truncated delta's error is above the best that any rank can do."""
    up, down, _ = truncate_factors(entry.up, entry.down, rank)
    lost = (matrix.double() - up.double() @ down.double()).norm()
    best = torch.linalg.svdvals(matrix.double())[rank:].norm()
    return max(0.0, float(lost / best) - 1.0)
