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

from benchmarks.boundaries import Matrices, matrices_of
from benchmarks.measure import (
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
from lcp_plugin.config.estimates import UNET_PARAMETERS
from lcp_plugin.delta import Delta, Dense, delta_to_tensors
from lcp_plugin.formats.disk import sync
from lcp_plugin.formats.lora_file import lora_tensors, read_lora, write_lora
from lcp_plugin.formats.tensors import write_tensors

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
        sample = Matrices(size, matrices.shapes[::parts], parts * matrices.parts)
        write_magmax_inputs(folder, sample, _others(size) // sample.parts)
        ours, theirs = alternate_children(
            lambda: run_part("magmax_ours", name), lambda: run_part("magmax_baseline", name), rounds
        )
        note = "whole models loaded, subtracted, selected, saved (bf16)"
        if sample.parts > 1:
            note += f"; both on 1/{sample.parts} of the model"
        base = run_part("torch_alone").peak_mb
        bar = matrices.bar(MAGMAX_TIME_BAR)
        rows.append(_time_row(f"MagMax, {sample.label}", ours, theirs, bar, note))
        if parts > 1:
            whole = Matrices(size, matrices.shapes)
            for file in folder.iterdir():
                file.unlink()
            write_magmax_inputs(folder, whole, 0)
            alone = [run_part("magmax_ours", name) for _ in range(rounds)]
            rows += _whole_rows(size, alone, theirs, parts, base)
        else:
            rows.append(_scaled_memory_row(sample, ours, theirs, base))
    return rows


def _others(size: str) -> int:
    """Weights of the UNet that no adapter changes; whole-model subtraction handles them too."""
    if size == "tiny":
        return 0
    return UNET_PARAMETERS - sum(out * inputs for out, inputs in matrices_of("sdxl").shapes)


def _scaled_memory_row(
    sample: Matrices, ours: list[Child], theirs: list[Child], base: float
) -> Row:
    """Peaks of both sides scaled up to the whole model, but for what a process costs anyway."""
    peaks = [max(c.peak_mb for c in side) for side in (ours, theirs)]
    scaled = [base + sample.parts * (peak - base) for peak in peaks]
    note = f"beyond torch itself times {sample.parts}, extrapolated" if sample.parts > 1 else ""
    bar = sample.bar(MAGMAX_MEMORY_BAR)
    name = f"MagMax, {sample.label}, peak memory"
    return Row(name, scaled[0], scaled[1], MB, peaks[0], bar, note)


def _time_row(
    name: str, ours: list[Child], theirs: list[Child], bar: float | None, note: str
) -> Row:
    seconds = [statistics.median(c.facts["wall"] for c in side) for side in (ours, theirs)]
    cpu = [statistics.median(c.facts["cpu"] for c in side) for side in (ours, theirs)]
    note += f"; CPU {cpu[0]:.3g} s against {cpu[1]:.3g} s"
    peak = max(c.peak_mb for c in ours)
    return Row(name, seconds[0], seconds[1], WALL, bar=bar, note=note, peak_mb=peak)


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
    from safetensors.torch import save_file

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

        def save_plain() -> None:
            save_file(lora_tensors(adapter, torch.bfloat16), plain)
            sync(plain)

        def save() -> None:
            write_lora(path, adapter, {}, torch.bfloat16)

        saved, written = alternate(save, save_plain, rounds), alternate(save, write_plain, rounds)
        read = alternate(lambda: read_lora(path), plain.read_bytes, rounds)
    note, of = f"{megabytes:.0f} MB in bf16", f"an adapter, {matrices.label}"
    ours = f"{note}, ours checked and hashed; both synced"
    timings = (
        (f"save {of}", saved, f"{ours}; safetensors' save_file", matrices.bar(SAVE_BAR)),
        (f"save {of}, beside raw bytes", written, f"{ours}; bytes at hand written", None),
        (f"load {of}", read, f"{note}, checked, as fp32; as many bytes read", None),
    )
    return [
        row_of(name, *pair, WALL, bar=bar, note=words, peak_mb=peak_mb())
        for name, pair, words, bar in timings
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
    note = "the file loaded whole, dense updates added, saved; ours is synced and measures rounding"
    label = f"fuse into a file, {matrices.label}, bf16"
    return [
        _time_row(label, ours, theirs, None, note),
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
