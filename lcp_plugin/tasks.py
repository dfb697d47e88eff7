"""What a run learns: tasks in an order.

Default prompts per kind, and the shuffling of the order, follow the protocol of arXiv 2410.04891.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["object", "style"]

MOST_CAPTIONS = 16  # distinct ones of a task that its record keeps

TRAIN_PROMPTS: Mapping[str, str] = MappingProxyType(
    {"object": "a photo of {concept}", "style": "{concept} image of {class_name}"}
)
EVAL_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": (
            "a {concept} in a purple wizard outfit",
            "a {concept} in a police outfit",
            "a {concept} wearing a santa hat",
            "a {concept} in a jail",
            "a {concept} looking into a mirror",
        ),
        "style": (
            "{concept} image of a wizard",
            "{concept} image of a policeman",
            "{concept} image of a santa hat",
            "{concept} image of a clock",
            "{concept} image of a mirror",
        ),
    }
)


@dataclass(frozen=True)
class Task:
    """One concept to learn. `index` counts along the whole chain, from 1."""

    index: int
    name: str
    kind: Kind
    concept: str  # e.g. "sks sneaker", or the name of a style
    prompts: tuple[str, ...]  # evaluation prompts, placeholders filled in
    train_prompt: str = ""  # caption of images that have none of their own
    images: tuple[str, ...] = ()  # paths; empty for a task read from a file
    overrides: Mapping[str, Any] = field(default_factory=dict)  # options that differ for this task
    parts: tuple[Task, ...] = ()  # the tasks that this one joins, if it is a joint one

    @property
    def folder(self) -> str:
        """Name of the task's folder, numbered along the chain: `03_watercolor`."""
        return f"{self.index:02d}_{self.name}"

    def records(self) -> tuple[TaskRecord, ...]:
        """One record, or one for each task that this one joins."""
        return tuple(part.record() for part in self.parts) or (self.record(),)

    def record(self, **facts: Any) -> TaskRecord:
        """What of this task travels in a carry: strings and counts, never data."""
        return TaskRecord(
            index=self.index,
            name=self.name,
            kind=self.kind,
            concept=self.concept,
            prompts=self.prompts,
            train_prompt=self.train_prompt,
            facts=dict(facts),
        )


@dataclass(frozen=True)
class TaskRecord:
    """A learned task as later tasks and files know it; `facts`: image count, steps, rank, ..."""

    index: int
    name: str
    kind: str
    concept: str
    prompts: tuple[str, ...] = ()
    train_prompt: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write and `from_json` reads back unchanged."""
        return {
            "index": self.index,
            "name": self.name,
            "kind": self.kind,
            "concept": self.concept,
            "prompts": list(self.prompts),
            "train_prompt": self.train_prompt,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskRecord:
        """A record as `to_json` wrote it; missing optional keys get their defaults."""
        return cls(
            index=int(data["index"]),
            name=str(data["name"]),
            kind=str(data.get("kind", "object")),
            concept=str(data.get("concept", data["name"])),
            prompts=tuple(str(p) for p in data.get("prompts", ())),
            train_prompt=str(data.get("train_prompt", "")),
            facts=dict(data.get("facts", {})),
        )


def class_words(kind: str, concept: str) -> str:
    """A concept without its rare token: "sks stuffed animal" -> "stuffed animal"."""
    token, _, rest = concept.partition(" ")
    return rest if kind == "object" and rest else token


def fill_prompt(template: str, concept: str, class_name: str = "") -> str:
    """`template` with {concept} and {class_name} filled in, nothing else interpreted."""
    return template.replace("{concept}", concept).replace("{class_name}", class_name)


def default_prompts(kind: Kind, concept: str) -> tuple[str, ...]:
    """The paper's five evaluation prompts of a kind, for one concept."""
    return tuple(fill_prompt(p, concept) for p in EVAL_PROMPTS[kind])


def shuffle_tasks(tasks: Sequence[Task], order_seed: int | None) -> tuple[Task, ...]:
    """The paper's order: `random.seed(s); random.shuffle(tasks)`; None keeps the file's order.

    Indices are renumbered from the first task's index, so a chain keeps counting.
    """
    if not tasks:
        return ()
    first = tasks[0].index
    order = list(tasks)
    if order_seed is not None:
        random.Random(order_seed).shuffle(order)
    return tuple(replace(task, index=first + i) for i, task in enumerate(order))
