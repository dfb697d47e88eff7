"""The machine's card as the bench sees it: a model built on it once, a clock and its memory.

Sizes are SDXL's own with random weights (`real_base`), or small ones to try the same code on a CPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lcp_plugin.sdxl.load import hush_libraries

CARD_SIDES: Mapping[str, int] = {"tiny": 32, "topo": 64, "sdxl": 1024}  # pixels
WEIGHTS_SEED = 0


@dataclass(frozen=True)
class Card:
    """Where to measure, and at which size."""

    size: str
    device: str  # cuda, cuda:1, cpu, ...

    @property
    def side(self) -> int:
        """Pixels of the images in training."""
        return CARD_SIDES[self.size]

    @property
    def counts_memory(self) -> bool:
        """Whether the device says what was allocated on it."""
        return self.device.startswith("cuda")

    @property
    def label(self) -> str:
        """Words for the table."""
        return "SDXL" if self.size == "sdxl" else f"a small UNet ({self.size})"

    def use(self) -> None:
        """This process trains here: accelerate looks for a card of its own otherwise."""
        if not self.counts_memory:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        else:
            torch.cuda.set_device(torch.device(self.device).index or 0)

    @cached_property
    def pipeline(self) -> Any:
        """The base that our side trains on: the UNet in bf16 on the device."""
        return self.build()

    def build(self) -> Any:
        """A new pipeline with the same weights."""
        hush_libraries()
        torch.manual_seed(WEIGHTS_SEED)
        if self.size == "sdxl":
            from benchmarks.real_base import build_pipeline

            pipeline = build_pipeline(self.device)
        else:
            from lcp_plugin.tiny.architecture import build_topo, build_toy

            pipeline = build_topo() if self.size == "topo" else build_toy()
            pipeline.unet.to(self.device, torch.bfloat16)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False)
        return pipeline

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.counts_memory:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on the device now."""
        return int(torch.cuda.memory_allocated(self.device)) if self.counts_memory else 0

    def restart_peak(self) -> None:
        """The peak is what is allocated now."""
        if self.counts_memory:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes since `restart_peak`."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.counts_memory else 0

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What `work` gives, and its seconds until the device is done."""
        self.wait()
        began = time.perf_counter()
        value = work()
        self.wait()
        return value, time.perf_counter() - began

    def describe(self) -> str:
        """The card's name and memory, or that there is none."""
        if not self.counts_memory:
            return "no card: CPU"
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"


@dataclass
class Side:
    """One of two sides that take turns on a card: its seconds and its own memory.

    What is allocated while a side is running belongs to it, so two sides on one card are told
    apart: its peak is what it holds plus what a step adds.
    """

    card: Card
    held: int = 0  # bytes
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def start(self) -> None:
        """The side begins to run."""
        self.card.wait()
        self.card.restart_peak()
        self._before = self.card.allocated()
        self._began = time.perf_counter()

    def stop(self, counts: bool = True) -> None:
        """The side pauses; `counts`: that was a step to be reported."""
        self.card.wait()
        seconds = time.perf_counter() - self._began
        if counts:
            self.seconds.append(seconds)
            self.peaks.append(self.held + self.card.peak() - self._before)
        self.held += self.card.allocated() - self._before

    @contextmanager
    def running(self, counts: bool = True) -> Iterator[None]:
        """`start` and `stop` around a block."""
        self.start()
        yield
        self.stop(counts)

    def median_seconds(self, warm: int) -> float:
        """Of the steps behind the first `warm` ones."""
        return statistics.median(self.seconds[warm:])

    def peak_mb(self, warm: int) -> float:
        """The largest peak of the steps behind the first `warm` ones."""
        return max(self.peaks[warm:]) / 2**20

    def joined(self, later: Side, warm: int) -> Side:
        """This side's steps, and those of a later turn behind its first `warm` ones."""
        seconds, peaks = later.seconds[warm:], later.peaks[warm:]
        return replace(self, seconds=self.seconds + seconds, peaks=self.peaks + peaks)


def bytes_of(model: nn.Module) -> int:
    """What a model's parameters take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
