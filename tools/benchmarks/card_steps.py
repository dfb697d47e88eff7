"""A training step on a card: the project's own loop beside diffusers' example, time and memory.

Between two of our steps the example takes one, on a model of its own with equal weights and equal
factors. The first step of both has the same noise and timestep: their losses must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.card import Card, Side, bytes_of
from benchmarks.card_example import ExampleOnCard
from benchmarks.measure import MB, WALL, Row
from benchmarks.steps import CAPTION, RATE, SEED, draw_image, noise_generator, write_config
from lcp_plugin.config.load import load_config
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.hooks import Carry, StepReport, Strategy
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.live_base import build_live_base
from lcp_plugin.sdxl.load import native_resolution
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task
from lcp_plugin.training.lesson import Classroom, Lesson
from lcp_plugin.training.loop import Watch, train_lesson
from lcp_plugin.training.processes import create_accelerator

WARM, TIMED = 3, 8  # steps
LOSS_TOLERANCE = 0.02  # relative; both sides round to bf16, in different orders
STEP_BAR, MEMORY_BAR = 0.90, 0.95


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    targets: str = "attention"  # | transformer
    checkpointing: bool = False
    rank: int = 32
    flags: Sequence[str] = ()  # further options

    @property
    def words(self) -> str:
        """For the table."""
        return "checkpointing" if self.checkpointing else "no checkpointing"

    def arguments(self) -> list[str]:
        """The options of the command line."""
        return [
            *("--mixed_precision", "bf16", "--optimizer_type", "AdamW8bit"),
            *("--lora_targets", self.targets),
            *(["--gradient_checkpointing"] if self.checkpointing else []),
            *self.flags,
        ]


@dataclass
class CardTraining:
    """The project's trainer on one cached image, as a run sets it up, at a boundary of a chain."""

    card: Card
    folder: Path
    setting: Setting = field(default_factory=Setting)
    strategy: Strategy = field(default_factory=lambda: create_strategy("merge_init", ()))
    carry: Carry = field(default_factory=Carry)
    steps: int = WARM + TIMED

    def __post_init__(self) -> None:
        draw_image(self.folder / "disc" / "0.png", self.card.side)
        path = write_config(self.folder, self.card.side, self.setting.rank, self.steps)
        config = load_config(["--config", str(path), *self.setting.arguments()])
        self.options, self.side = config.options, Side(self.card)
        pipeline = self.card.pipeline
        pipeline.unet.disable_gradient_checkpointing()
        self.side.held = bytes_of(pipeline.unet)
        with self.side.running(counts=False):
            accelerator = create_accelerator("bf16")
            base = build_live_base(self.options, pipeline, accelerator.device, accelerator.autocast)
            store = RunStore(self.folder / "out", "bench")
            self.room = Classroom(base, accelerator, self.strategy, store, SEED)
            index = len(self.carry.tasks) + 1
            self.task = Task(index, f"disc{index}", "object", "sks disc", (), CAPTION)
            native = native_resolution(pipeline)
            self.data = TaskData(config.tasks[0], SEED, index, (native, native))
            self.data.prepare(base.encode_images, base.encode_prompts, "vae", "text")
        self.spec = self.room.spec(self.task, self.options)
        self.start = self.strategy.begin_task(self.task, self.carry, self.spec)

    def train(self, between: Callable[[StepReport], None] = lambda report: None) -> Side:
        """All steps; `between` is called after each, while our side pauses."""

        def on_step(report: StepReport) -> None:
            self.side.stop()
            between(report)
            self.side.start()

        self.side.start()
        try:
            lesson = Lesson(self.task, self.options, self.data, self.start, self.carry)
            train_lesson(lesson, self.room, Watch(on_step))
        finally:
            self.side.stop(counts=False)
            self.close()
        return self.side

    def close(self) -> None:
        """The model is the bare base again."""
        self.room.base.adapted.release()
        self.card.pipeline.unet.requires_grad_(False)

    def batch(self) -> Mapping[str, Tensor]:
        """The task's one example on the device, for the other side."""
        found = {k: v for k, v in self.data.batch(0).items() if isinstance(v, Tensor)}
        return {key: value.to(self.room.base.device) for key, value in found.items()}


def measure_step(card: Card) -> Iterator[Row]:
    """Rows: seconds and peak memory of a step against the example's, four settings."""
    for targets in ("attention", "transformer"):
        for checkpointing in (False, True):
            yield from _compare(card, Setting(targets, checkpointing))


def measure_bf16_factors(card: Card) -> Iterator[Row]:
    """Rows: the same beside the example as it is published, which trains its factors in bf16."""
    for checkpointing in (False, True):
        yield from _compare(card, Setting(checkpointing=checkpointing), in_fp32=False)


def _compare(card: Card, setting: Setting, in_fp32: bool = True) -> Iterator[Row]:
    example: Any = card.build()
    with tempfile.TemporaryDirectory() as folder:
        ours = CardTraining(card, Path(folder), setting)
        theirs = Side(card, held=bytes_of(example.unet))
        factors = {name: (f.down, f.up) for name, f in ours.start.adapter.items()}
        with theirs.running(counts=False):
            side = ExampleOnCard(
                example, factors, ours.batch(), RATE, setting.checkpointing, in_fp32
            )
        losses: list[tuple[float, float]] = []

        def between(report: StepReport) -> None:
            same = None if losses else noise_generator(0)
            with theirs.running():
                loss = side.step(same)
            losses.append((report.loss, loss))

        ours.train(between)
    words = "" if in_fp32 else " (the example's factors in bf16)"
    for row in _step_rows(card, setting, len(factors), (ours.side, theirs), losses[0]):
        yield replace(row, name=row.name + words)


def _step_rows(
    card: Card, setting: Setting, layers: int, sides: tuple[Side, Side], first: tuple[float, float]
) -> Iterator[Row]:
    ours, theirs = sides
    apart = abs(first[0] - first[1]) / abs(first[1])
    if not apart <= LOSS_TOLERANCE:
        raise AssertionError(f"the first losses differ: ours {first[0]}, the example's {first[1]}")
    name = f"{card.label}, {card.side} px, bf16, rank {setting.rank}, {layers} layers"
    label = f"step, {name}, AdamW8bit, {setting.words}"
    note = f"medians of {TIMED} steps in turn; first losses equal to {apart:.1e}"
    seconds = ours.median_seconds(WARM), theirs.median_seconds(WARM)
    yield Row(label, *seconds, WALL, bar=STEP_BAR, note=note)
    if card.counts_memory:
        peaks = ours.peak_mb(WARM), theirs.peak_mb(WARM)
        words = f"peak memory of a {label}"
        yield Row(words, *peaks, MB, bar=MEMORY_BAR, note="what each side holds, and its step's")
