"""Which strategies can be replayed from their folders, and the tasks as they saw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.store.task_folder import TaskFolder
from lcp_plugin.tasks import Task, TaskRecord

StrategyMaker = Callable[[str, Sequence[str]], Strategy]
STEP_HOOKS = (
    "before_training",
    "rehearse",
    "before_backward",
    "before_optimizer_step",
    "after_optimizer_step",
    "after_training",
)


def is_replayable(strategy: Strategy) -> bool:
    """Whether end_task alone makes the strategy's state: it looks at no training step."""
    return all(getattr(type(strategy), h) is getattr(Strategy, h) for h in STEP_HOOKS)


def task_of(folder: TaskFolder, carry: Carry) -> Task:
    """The task of a folder as its strategy saw it, joint parts included."""

    def task(record: TaskRecord) -> Task:
        return Task(
            index=record.index,
            name=record.name,
            kind="style" if record.kind == "style" else "object",
            concept=record.concept,
            prompts=record.prompts,
            train_prompt=record.train_prompt,
        )

    records = folder.records[len(carry.tasks) :]
    parts = tuple(task(r) for r in records)
    if len(parts) == 1:
        return parts[0]
    return Task(records[-1].index, "joint", "object", "joint", (), parts=parts)
