"""Where a step's time goes on a card: the kernels that take most of it, and the host's share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import Card
from benchmarks.card_steps import WARM, CardTraining, Setting
from benchmarks.measure import WALL, Row
from lcp_plugin.hooks import StepReport

PROFILED, SHOWN = 3, 15  # steps, kernels
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def measure_profile(card: Card, text: Path | None = None) -> Iterator[Row]:
    """Rows: how long the device is busy in a step of ours; `text`: where the tables go."""
    for checkpointing in (False, True):
        setting = Setting(checkpointing=checkpointing)
        profiler, wall = profile_steps(card, setting)
        events = profiler.key_averages()
        busy = sum(_on_device(event) for event in events) / PROFILED / 1e6
        host = sum(event.self_cpu_time_total for event in events) / PROFILED / 1e6
        launches = [event for event in events if event.key in LAUNCHES]
        spent = sum(event.self_cpu_time_total for event in launches) / PROFILED / 1e6
        count = sum(event.count for event in launches) / PROFILED
        note = f"host {host:.3f} s, of it {count:.0f} launches {spent:.3f} s; baseline: the step"
        row = Row(f"device busy in a step, {card.label}, {setting.words}", busy, wall, WALL)
        if text is not None:
            kind = "self_device_time_total" if card.counts_memory else "self_cpu_time_total"
            table = events.table(sort_by=kind, row_limit=SHOWN, max_name_column_width=90)
            with text.open("a", encoding="utf-8") as file:
                file.write(f"{row.name}: {busy:.4f} s of {wall:.4f} s; {note}\n{table}\n\n")
        yield Row(row.name, busy, wall, WALL, note=note)


def profile_steps(card: Card, setting: Setting) -> tuple[Any, float]:
    """A torch profiler over some steps behind the warm ones, and their mean seconds under it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if card.counts_memory:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    def between(report: StepReport) -> None:
        if report.index == WARM:
            profiler.start()
        if report.index == WARM + PROFILED:
            profiler.stop()

    with tempfile.TemporaryDirectory() as folder:
        training = CardTraining(card, Path(folder), setting, steps=WARM + PROFILED)
        side = training.train(between)
    return profiler, sum(side.seconds[WARM:]) / PROFILED


def _on_device(event: Any) -> float:
    """Microseconds of kernels; what torch's own operators launched is counted once, there."""
    if "CUDA" not in str(event.device_type):
        return 0.0
    return float(event.self_device_time_total)
