"""A chain on a card: the tenth task beside the first, rehearsal beside none, the boundaries.

Earlier tasks are synthetic: B ~ N(0, .001^2) on the adapter that the strategy itself starts from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.card import Card, Side
from benchmarks.card_steps import WARM, CardTraining, Setting
from benchmarks.measure import MB, WALL, Row
from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.carries import hashing
from lcp_plugin.tasks import Task

UP_STD = 1e-3
RECALL = ("of=naive", "images=1", "sample_steps=4")
TENTH = 10
TENTH_BAR, TENTH_RECALL_BAR = 1.10, 1.05
RECALL_BAR, RECALL_MEMORY_BAR = 2.0, 1.03
BOUNDARY_SECONDS, BOUNDARY_RANK = 3.0, 64
BOUNDARIES = (
    ("naive", ()),
    ("merge_init", ()),
    ("merge_ortho_init", ()),
    ("magmax", ()),
    ("recall", RECALL),
)


def learned_task(index: int) -> Task:
    """A task that is not trained here."""
    concept = f"sks{index} thing"
    return Task(index, f"task{index}", "object", concept, (), f"a photo of {concept}")


def pretend_training(start: Adapter, seed: int, device: str) -> Adapter:
    """The start with B moved at random, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)

    def moved(f: Factors) -> Factors:
        step = torch.randn(f.up.shape, generator=generator, device=device) * UP_STD
        return Factors(f.down, f.up + step.to(f.up), f.alpha, f.kernel)

    return Adapter({name: moved(factors) for name, factors in start.items()})


def make_carry(strategy: Strategy, spec: AdapterSpec, tasks: int, device: str) -> Carry:
    """What crosses behind so many synthetic tasks."""
    carry = Carry()
    for index in range(1, tasks + 1):
        task = learned_task(index)
        start = strategy.begin_task(task, carry, spec)
        carry = strategy.end_task(task, carry, pretend_training(start.adapter, index, device))
    return carry


def spec_of(card: Card, setting: Setting) -> AdapterSpec:
    """What an adapter of this setting looks like on the card's model."""
    with tempfile.TemporaryDirectory() as folder:
        training = CardTraining(card, Path(folder), setting)
        training.close()
    return training.spec


def train_at(card: Card, name: str, args: Sequence[str], index: int) -> Side:
    """The steps of the index-th task of a chain."""
    strategy = create_strategy(name, tuple(args))
    carry = make_carry(strategy, spec_of(card, Setting()), index - 1, card.device)
    with tempfile.TemporaryDirectory() as folder:
        return CardTraining(card, Path(folder), Setting(), strategy, carry).train()


def train_in_turn(
    card: Card, name: str, args: Sequence[str], tasks: tuple[int, int]
) -> tuple[Side, Side]:
    """The steps of two tasks of a chain, each trained twice in turn: the host's speed wanders."""
    turns = [[train_at(card, name, args, index) for index in tasks] for _ in range(2)]
    one, other = (first.joined(second, WARM) for first, second in zip(*turns, strict=True))
    return one, other


def measure_tenth(card: Card) -> Iterator[Row]:
    """Rows: the tenth task of a chain beside the first one (with recall: the first that has
    anything to rehearse).
    """
    chains: Sequence[tuple[str, Sequence[str], int, float]] = (
        ("merge_init", (), 1, TENTH_BAR),
        ("naive", (), 1, TENTH_BAR),
        ("recall", RECALL, 2, TENTH_RECALL_BAR),
    )
    for name, args, first, bar in chains:
        sides = train_in_turn(card, name, args, (TENTH, first))
        label = f"the tenth task's step, {_words(name, args)}, {card.label}, rank 32"
        yield from _pair(card, label, sides, (bar, bar), f"baseline: task {first} of that chain")


def measure_recall(card: Card) -> Iterator[Row]:
    """Rows: a step that rehearses an earlier task beside the same strategy's without."""
    sides = train_at(card, "recall", RECALL, 2), train_at(card, "naive", (), 2)
    label = f"recall's step, {card.label}, rank 32"
    bars = RECALL_BAR, RECALL_MEMORY_BAR
    yield from _pair(card, label, sides, bars, "baseline: naive, the second task")


def _pair(
    card: Card, label: str, sides: tuple[Side, Side], bars: tuple[float, float], note: str
) -> Iterator[Row]:
    ours, theirs = sides
    seconds = ours.median_seconds(WARM), theirs.median_seconds(WARM)
    yield Row(label, *seconds, WALL, bar=bars[0], note=note)
    if card.counts_memory:
        peaks = ours.peak_mb(WARM), theirs.peak_mb(WARM)
        yield Row(f"peak memory of {label}", *peaks, MB, bar=bars[1], note=note)


def measure_boundary(card: Card) -> Iterator[Row]:
    """Rows: seconds between the last step of the second task and the first one of the third."""
    setting = Setting(rank=BOUNDARY_RANK if card.size == "sdxl" else 4)
    spec = spec_of(card, setting)
    for name, args in BOUNDARIES:
        parts = _cross(card, create_strategy(name, tuple(args)), spec, setting)
        first = parts.pop("first show")
        total = sum(parts.values())
        note = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
        yield Row(
            f"boundary of {_words(name, args)}, {card.label}, rank {setting.rank}",
            total,
            BOUNDARY_SECONDS,
            WALL,
            bar=1.0,
            note=f"{note}; at the first boundary show takes {first:.2f}; baseline: the bar itself",
        )


def _cross(card: Card, strategy: Strategy, spec: AdapterSpec, setting: Setting) -> dict[str, float]:
    """Seconds of each part of the second boundary of a chain, as a run goes through them."""
    carry = make_carry(strategy, spec, 1, card.device)
    parts: dict[str, float] = {}

    def clocked(part: str, work: Callable[[], object]) -> object:
        value, parts[part] = card.time(work)
        return value

    def show_hashing(after: Carry) -> None:
        with hashing(after):
            adapted.set_base(after.total, way)

    with tempfile.TemporaryDirectory() as folder:
        training = CardTraining(card, Path(folder), setting, strategy, carry)
        adapted, way = training.room.base.adapted, training.room.base.carry_as
        try:
            clocked("first show", lambda: adapted.set_base(carry.total, way))
            adapted.set_base(training.start.base, way)
            adapted.attach(training.start.adapter)
            trained = pretend_training(training.start.adapter, 2, card.device)
            task, following = learned_task(2), learned_task(3)
            after, parts["end_task"] = card.time(lambda: strategy.end_task(task, carry, trained))
            clocked("show and hash", lambda: show_hashing(after))
            start, parts["begin_task"] = card.time(
                lambda: strategy.begin_task(following, after, spec)
            )
            clocked("set_base", lambda: adapted.set_base(start.base, way))
            clocked("attach", lambda: adapted.attach(start.adapter, start.trainable))
        finally:
            training.close()
    return parts


def _words(name: str, args: Sequence[str]) -> str:
    of = [arg for arg in args if arg.startswith("of=")]
    return f"{name} {of[0]}" if of else name
