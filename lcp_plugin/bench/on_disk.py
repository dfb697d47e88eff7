"""Boundaries that go through files: MagMax, an adapter's save and load, a fused checkpoint.

Both sides of MagMax and of the fuse run in processes of their own, so that peaks are theirs alone.
`share` is the part of the model that runs; the baseline, which holds whole models in memory, cannot
run whole on a small machine.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.bench.boundaries import Matrices, matrices_of
from lcp_plugin.bench.measure import (
    MB,
    WALL,
    Child,
    Row,
    alternate,
    alternate_children,
    peak_mb,
    row_of,
    run_part,
)
from lcp_plugin.config.plan import UNET_PARAMETERS
from lcp_plugin.delta import Delta, Dense, delta_to_tensors
from lcp_plugin.files import sync, write_tensors
from lcp_plugin.formats import read_lora, write_lora

MAGMAX_MEMORY_BAR, MAGMAX_TIME_BAR = 1 / 10, 1 / 5
RESIDENT_BAR_MB = 1000.0
SAVE_BAR = 1.5  # "at disk speed"
SHARES = {"sdxl": 8, "topo": 1, "tiny": 1}  # the baseline runs on one part in so many


# -------------------------------------------------------------------------------------- MagMax


def measure_magmax(size: str, rounds: int = 2) -> list[Row]:
    """Rows: time and peak memory of MagMax against subtracting whole models, and its own whole."""
    matrices, parts = matrices_of(size), SHARES[size]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = Matrices(size, matrices.shapes[::parts])
        write_magmax_inputs(folder, sample, _others(matrices) // parts)
        ours, theirs = alternate_children(
            lambda: run_part("magmax_ours", name), lambda: run_part("magmax_baseline", name), rounds
        )
        note = "whole models loaded, subtracted, selected, saved (bf16)"
        if parts > 1:
            note += f"; both on 1/{parts} of the model"
        base = run_part("torch_alone").peak_mb
        rows.append(_time_row(f"MagMax, {size}", ours, theirs, MAGMAX_TIME_BAR, note, size))
        if parts > 1:
            whole = Matrices(size, matrices.shapes)
            for file in folder.iterdir():
                file.unlink()
            write_magmax_inputs(folder, whole, 0)
            alone = [run_part("magmax_ours", name) for _ in range(rounds)]
            rows += _whole_rows(size, alone, theirs, parts, base)
        else:
            rows.append(_memory_row(f"MagMax, {size}, peak memory", ours, theirs, None, note))
    return rows


def _others(matrices: Matrices) -> int:
    """Weights of the UNet that no adapter changes; whole-model subtraction handles them too."""
    if matrices.size != "sdxl":
        return 0
    return UNET_PARAMETERS - sum(out * inputs for out, inputs in matrices.shapes)


def _time_row(
    name: str, ours: list[Child], theirs: list[Child], bar: float, note: str, size: str
) -> Row:
    seconds = [statistics.median(c.facts["wall"] for c in side) for side in (ours, theirs)]
    peak = max(c.peak_mb for c in ours)
    limit = bar if size == "sdxl" else None
    return Row(name, seconds[0], seconds[1], WALL, bar=limit, note=note, peak_mb=peak)


def _memory_row(
    name: str, ours: list[Child], theirs: list[Child], bar: float | None, note: str
) -> Row:
    peaks = [max(c.peak_mb for c in side) for side in (ours, theirs)]
    return Row(name, peaks[0], peaks[1], MB, bar=bar, note=note, peak_mb=peaks[0])


def _whole_rows(
    size: str, ours: list[Child], theirs: list[Child], parts: int, base: float
) -> list[Row]:
    """Ours on all matrices; the baseline scaled up, but for what a process costs anyway."""
    peak, resident = max(c.peak_mb for c in ours), max(c.facts["anonymous_mb"] for c in ours)
    scaled = base + parts * (max(c.peak_mb for c in theirs) - base)
    seconds = statistics.median(c.facts["wall"] for c in ours)
    theirs_seconds = parts * statistics.median(c.facts["wall"] for c in theirs)
    note = f"ours whole; baseline from 1/{parts}, extrapolated"
    name = f"MagMax, {size}, all matrices"
    return [
        Row(name, seconds, theirs_seconds, WALL, peak, MAGMAX_TIME_BAR, note),
        Row(f"{name}, peak memory", peak, scaled, MB, peak, MAGMAX_MEMORY_BAR, note),
        Row(
            f"{name}, resident beyond mapped pages / 1 GB",
            resident,
            RESIDENT_BAR_MB,
            MB,
            peak,
            1.0,
            "the process itself, torch included",
        ),
    ]


def write_magmax_inputs(folder: Path, matrices: Matrices, others: int) -> None:
    """A task's adapter, a dense carry (fp32), and three bf16 models of the same matrices.

    base W_0; merged: W_0 + D_{t-1}; trained: W_0 + D_{t-1} + U_t. Other weights are the same.
    """
    adapter = matrices.adapter(matrices.rank, 6)
    write_lora(folder / "adapter.safetensors", adapter)
    generator = torch.Generator().manual_seed(7)
    older = {name: torch.randn(f.shape, generator=generator) * 1e-3 for name, f in adapter.items()}
    delta = Delta({name: Dense(matrix) for name, matrix in older.items()})
    write_tensors(folder / "carry.safetensors", delta_to_tensors(delta, "delta/"))
    if not others and matrices.size == "sdxl":
        return
    models: dict[str, dict[str, Tensor]] = {"base": {}, "merged": {}, "trained": {}}
    for name, factors in adapter.items():
        weight = torch.randn(factors.shape, generator=generator) * 0.03
        merged = weight + older[name]
        values = (weight, merged, merged + factors.update())
        for model, value in zip(models.values(), values, strict=True):
            model[name] = value.to(torch.bfloat16)
    for start in range(0, others, 1 << 24):
        rest = torch.zeros(min(1 << 24, others - start), dtype=torch.bfloat16)
        for model in models.values():
            model[f"rest.{start}"] = rest
    for name, model in models.items():
        write_tensors(folder / f"{name}.safetensors", model)


# ------------------------------------------------------------------------------ save and load


def measure_save(size: str, rounds: int = 3) -> list[Row]:
    """Rows: an adapter written and read, against as many bytes."""
    matrices = matrices_of(size)
    adapter = matrices.adapter(matrices.rank, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, plain = folder / "adapter.safetensors", folder / "plain"
        write_lora(path, adapter, {}, torch.bfloat16)
        data = path.read_bytes()
        megabytes = len(data) / 1e6

        def write_plain() -> None:
            plain.write_bytes(data)
            sync(plain)

        saved = alternate(
            lambda: write_lora(path, adapter, {}, torch.bfloat16), write_plain, rounds
        )
        read = alternate(lambda: read_lora(path), plain.read_bytes, rounds)
    note = f"{megabytes:.0f} MB in bf16"
    bar = SAVE_BAR if size == "sdxl" else None
    return [
        row_of(
            f"save an adapter, {size}",
            *saved,
            WALL,
            bar=bar,
            note=f"{note}, hashed and synced; as many bytes written and synced",
            peak_mb=peak_mb(),
        ),
        row_of(
            f"load an adapter, {size}",
            *read,
            WALL,
            note=f"{note}, checked, as fp32; as many bytes read",
            peak_mb=peak_mb(),
        ),
    ]


# ------------------------------------------------------------------------- a fused checkpoint


def measure_checkpoint(size: str, rounds: int = 2) -> list[Row]:
    """Rows: a delta fused into a weights file, streamed, against loading and saving it whole."""
    matrices = matrices_of(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint_inputs(folder, matrices)
        ours, theirs = alternate_children(
            lambda: run_part("checkpoint_ours", name),
            lambda: run_part("checkpoint_baseline", name),
            rounds,
        )
    note = "the file loaded whole, dense updates added, saved"
    label = f"fuse into a file, {size}, bf16"
    return [
        _time_row(label, ours, theirs, 0.0, note, ""),
        _memory_row(f"{label}, peak memory", ours, theirs, None, note),
    ]


def write_checkpoint_inputs(folder: Path, matrices: Matrices) -> None:
    """The adapted matrices as a weights file of a UNet, and an adapter."""
    adapter = matrices.adapter(matrices.rank, 9)
    write_lora(folder / "adapter.safetensors", adapter)
    generator = torch.Generator().manual_seed(10)
    weights = {
        f"{name.removeprefix('unet.')}.weight": (
            torch.randn(f.shape, generator=generator) * 0.03
        ).to(torch.bfloat16)
        for name, f in adapter.items()
    }
    write_tensors(folder / "unet.safetensors", weights)
