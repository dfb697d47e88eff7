"""What this machine has, and which preset fits: for `lcp doctor`.

Every optional package is tried, not only imported: a kernel that cannot run is found here instead
of in the middle of a run. Memory is estimated for SDXL by component (`config.estimates`), at the
tenth task; `measuring` measures it.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lcp_plugin.config.estimates import GB, estimate_memory, estimate_seconds, find_cost
from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.formats.disk import cache_folder
from lcp_plugin.run.forecast import estimate_run
from lcp_plugin.sdxl.stored import is_native
from lcp_plugin.telling.wording import counted

PRESETS = ("8gb", "12gb", "24gb")  # smallest first
SIDE = 1024  # pixels
TASKS = 10


@dataclass(frozen=True)
class Check:
    """One line about the machine."""

    what: str
    found: str
    usable: bool


@dataclass(frozen=True)
class Memory:
    """GPU memory of a preset in GB, by component; estimates."""

    preset: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All together."""
        return sum(self.parts.values())


# ------------------------------------------------------------------------------- the machine


def examine(output_dir: Path, rank: int) -> list[Check]:
    """Everything about this machine that a run depends on."""
    checks = [
        Check("python", platform.python_version(), True),
        Check("torch", torch.__version__, True),
        Check("processor", _describe_processor(), True),
        _examine_gpu(),
        _try("xformers", "--xformers; SDPA is used without it", _use_xformers),
        _try("bitsandbytes", "AdamW8bit and other 8-bit optimizers", _use_bitsandbytes),
    ]
    need = estimate_run(Options(network_dim=rank), 0, TASKS, SIDE**2).disk_gb
    checks.append(_examine_disk("output folder", output_dir, need, f"{TASKS} tasks at rank {rank}"))
    checks.append(_examine_disk("cache folder", cache_folder(), 1.0, "encoded images and texts"))
    return checks


def _describe_processor() -> str:
    """Cores, memory, instruction set, and whether half precision is slow on it."""
    found = counted(os.cpu_count() or 1, "core")
    found += f", {memory:.1f} GB of memory" if (memory := _memory_gb()) else ""
    found += f", {torch.backends.cpu.get_cpu_capability()}"
    if is_native(torch.bfloat16):
        return f"{found} with bf16"
    return f"{found} without bf16: on the CPU use mixed_precision no (--base_dtype bf16 saves room)"


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    except (AttributeError, ValueError, OSError):  # Windows
        return 0.0


def free_vram_gb() -> float | None:
    """Of the first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.mem_get_info(0)[0]) / GB


def _examine_gpu() -> Check:
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory() / GB
        return Check("MPS", f"Apple's GPU, {size:.1f} GB of the memory may be its own", True)
    if not torch.cuda.is_available():
        return Check("CUDA", "no GPU that torch can use: training runs on the CPU, slowly", False)
    properties = torch.cuda.get_device_properties(0)
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use mixed_precision fp16"
    total, free = properties.total_memory / GB, free_vram_gb()
    count = torch.cuda.device_count()
    found = f"{count} x {properties.name}, {total:.1f} GB ({free:.1f} free), {bf16}"
    return Check("CUDA", f"{found}, CUDA {torch.version.cuda}", True)


def _try(package: str, purpose: str, use: Callable[[], str]) -> Check:
    try:
        return Check(package, f"{use()}: {purpose}", True)
    except Exception as error:  # a broken binary may raise anything
        reason = (str(error).strip().split("\n") or [""])[0] or type(error).__name__
        return Check(package, f"unusable here ({reason[:100]}): {purpose}", False)


def _use_xformers() -> str:
    """Its attention on a small tensor. Raises whatever it raises."""
    import xformers
    import xformers.ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(1, 8, 1, 8, device=device)
    xformers.ops.memory_efficient_attention(query, query, query)
    return str(xformers.__version__)


def _use_bitsandbytes() -> str:
    """A step of its 8-bit AdamW on a scratch parameter. Raises whatever it raises."""
    from lcp_plugin.training.optimizers import OptimizerChoice, create_optimizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch = nn.Parameter(torch.zeros(64, 128, device=device))
    quiet = logging.getLogger("lcp_plugin.training.optimizers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        name = create_optimizer(OptimizerChoice("AdamW8bit", rate=1e-3), [{"params": [scratch]}])[1]
    finally:
        quiet.setLevel(level)
    if not name.startswith("bitsandbytes"):
        raise RuntimeError("not installed, or its kernels do not run")
    import bitsandbytes

    where = "" if device == "cuda" else " (on this CPU: works, saves nothing)"
    return f"{bitsandbytes.__version__}{where}"


def _examine_disk(what: str, folder: Path, need: float, purpose: str) -> Check:
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free / GB
    found = f"{free:.1f} GB free at {place}; {purpose} need about {need:.1f} GB"
    return Check(what, found, free >= need)


# ------------------------------------------------------------------------------- the presets


def preset_options(preset: str, rank: int) -> Options:
    """A preset's options, as a run without any of its own would get them."""
    options = load_config(["--preset", preset, "--list_strategies"]).options
    return replace(options, network_dim=rank, network_alpha=float(rank))


def preset_memory(preset: str, options: Options, tasks: int = TASKS) -> Memory:
    """GPU memory by component at the last of `tasks` tasks."""
    parts = estimate_memory(options, tasks, SIDE**2)
    return Memory(preset, {name: size for name, size in parts.items() if size > 0})


def choose_preset(memories: list[Memory], free_gb: float | None) -> Memory | None:
    """The most generous preset that fits into the free memory; None if none does, or no GPU."""
    fitting = [m for m in memories if free_gb is not None and m.total <= free_gb]
    return fitting[-1] if fitting else None


# --------------------------------------------------------------------------------- the report


def describe_machine(output_dir: Path, rank: int) -> str:
    """The whole report as text."""
    checks = examine(output_dir, rank)
    width = max(len(c.what) for c in checks)
    lines = ["This machine"]
    lines += [f"  {'ok' if c.usable else '--'}  {c.what:<{width}}  {c.found}" for c in checks]
    chosen = {preset: preset_options(preset, rank) for preset in PRESETS}
    memories = [preset_memory(preset, options) for preset, options in chosen.items()]
    lines += ["", f"GPU memory on SDXL at {SIDE} px, rank {rank}, at task {TASKS}, in GB"]
    lines += _memory_table(memories)
    seconds = [estimate_seconds(options, SIDE**2, TASKS) for options in chosen.values()]
    lines += ["", "A step in seconds: " + _beside([f"{s:.2f}" for s in seconds])]
    lines += [
        "Activations and seconds of: " + _beside([find_cost(o).told for o in chosen.values()])
    ]
    lines += ["", _advise(memories, free_vram_gb())]
    return "\n".join(lines)


def _beside(values: list[str]) -> str:
    return ", ".join(f"{value} ({preset})" for preset, value in zip(PRESETS, values, strict=True))


def _memory_table(memories: list[Memory]) -> list[str]:
    names = list(dict.fromkeys(name for memory in memories for name in memory.parts))
    width = max(len(name) for name in names)
    lines = [f"  {'':<{width}}  " + "  ".join(f"{m.preset:>6}" for m in memories)]
    for name in names:
        sizes = "  ".join(f"{m.parts.get(name, 0.0):>6.2f}" for m in memories)
        lines.append(f"  {name:<{width}}  {sizes}")
    totals = "  ".join(f"{m.total:>6.2f}" for m in memories)
    return [*lines, f"  {'together':<{width}}  {totals}"]


def _advise(memories: list[Memory], free_gb: float | None) -> str:
    if free_gb is None:
        return (
            "No GPU: the quickstart on tiny-sdxl takes minutes; SDXL itself, on one core in bf16 "
            "with checkpointing, about 10 s a step at 256 px and 140 s at 1024 px."
        )
    chosen = choose_preset(memories, free_gb)
    if chosen is None:
        least = memories[0]
        return (
            f"No preset fits into {free_gb:.1f} GB: --preset {least.preset} needs about "
            f"{least.total:.1f} GB; lower --resolution or --network_dim, or free GPU memory."
        )
    return f"Fits: --preset {chosen.preset} ({chosen.total:.1f} of {free_gb:.1f} GB free)."
