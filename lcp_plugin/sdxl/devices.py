"""CUDA, Apple's GPUs (MPS) and the CPU, where they differ.

MPS has no float64, one random state that is asked for without a device, and no count of its peak
memory; running out of memory is a RuntimeError there (torch.mps' documentation, torch 2.13).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.disk import first_line

WITHOUT_FLOAT64 = frozenset({"mps"})  # kinds of device
SMALL = 20_000_000  # parameters of a UNet whose operators several threads only wait for
_MPS_IS_FULL = "MPS backend out of memory"  # how its message begins


def count_processes() -> int:
    """How many small models a CPU serves best at a time: one on each core, of four at most."""
    return min(4, os.cpu_count() or 1)


def calm_threads(parameters: int) -> None:
    """One CPU thread for a small UNet of so many parameters, unless OMP_NUM_THREADS says otherwise.

    Its operators are too small to share, and threads that wait for each other spin. tiny-sdxl on
    two cores of an AMD EPYC: alone .33 s a step on two threads and .35 s on one; beside one busy
    process 1.3 to 1.5 s on two and .42 s on one.
    """
    if parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def choose_device(asked: str | None = None) -> str:
    """What was asked for, else cuda or mps where torch can use one, else the CPU.

    Raises ConfigError for a device that torch does not have here.
    """
    if asked:
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = first_line(error, 90).rstrip(".")
            raise ConfigError(
                f"device {asked!r} is not to be had here ({reason}); leave it out, and what "
                "there is is taken."
            ) from error
        return asked
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device that has no more."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widen(values: Tensor) -> Tensor:
    """The values in the widest type of their device, for sums and differences of squares."""
    return values.to(widest_float(values.device))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory, in whatever words it says so."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith(_MPS_IS_FULL)


def free_memory() -> None:
    """Gives back to the device what nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """torch's global generators (dropout uses them) seeded for a block, put back after it."""
    kept = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if kept is not None:
                torch.mps.set_rng_state(kept)
