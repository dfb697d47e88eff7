"""Boundaries that go through files: an adapter's save and load, a fused checkpoint.

Both sides of the fuse run in processes of their own, so that peaks are theirs alone.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

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
from lcp_plugin.formats.disk import sync
from lcp_plugin.formats.lora_file import lora_tensors, read_lora, write_lora
from lcp_plugin.formats.tensors import write_tensors

SAVE_BAR = 1.5  # "at disk speed"


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
