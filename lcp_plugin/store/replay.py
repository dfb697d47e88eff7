"""Carries that were not kept, rebuilt bit for bit: end_task once more on the saved adapters.

    C_0 = what the run started from,   C_k = end_task(task_k, C_{k-1}, adapter_k)

What comes out is compared with the hash that was recorded when the carry was saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lcp_plugin.biases import Change
from lcp_plugin.errors import TaskFolderError
from lcp_plugin.formats.identity import hash_tensors
from lcp_plugin.hooks import Carry, Strategy, step_hooks_of
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.store.task_folder import Parent, TaskFolder, read_kept_parent
from lcp_plugin.tasks import Task, TaskRecord


@dataclass
class Replay:
    """The carries behind a run's folders, asked for oldest first; a step back begins anew."""

    root: Path  # the run's folder
    folders: Sequence[TaskFolder]  # its tasks in order
    _at: int = -1
    _carry: Carry = field(default_factory=Carry)
    _strategy: Strategy | None = None

    def carry_behind(self, position: int) -> Carry:
        """The carry of the folder at `position`: read, or rebuilt.

        Raises:
            LineageError: an adapter before it is missing, or other tensors come out.
        """
        folder = self.folders[position]
        return folder.read_carry() if folder.carry_file.is_file() else self._rebuild(position)[0]

    def change_behind(self, position: int) -> Change:
        """What the model behind the folder at `position` adds to the base. Raises LineageError."""
        return self.carry_behind(position).change

    def parent_behind(self, position: int) -> Parent:
        """The folder at `position` as the start of a run, its strategy's state included.

        Raises:
            LineageError: an adapter before it is missing, other tensors come out, or the state is
                gone and end_task alone does not make it again.
        """
        folder = self.folders[position]
        if folder.carry_file.is_file():
            return folder.parent()
        carry, strategy = self._rebuild(position)
        return replace(folder.described(), carry=carry, state=_state_behind(folder, strategy))

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which begins a replay of its own."""
        return Replay, (self.root, self.folders)

    def _rebuild(self, position: int) -> tuple[Carry, Strategy]:
        strategy = self._strategy
        if strategy is None or position < self._at:
            strategy = self._begin()
        while self._at < position:
            folder = self.folders[self._at + 1]
            task = task_of(folder, self._carry)
            carry = strategy.end_task(task, self._carry, folder.read_adapter())
            biases = self._carry.biases  # the run's own, whatever a strategy returns
            self._carry = Carry(carry.delta, carry.adapter, folder.records, biases)
            self._at += 1
        folder = self.folders[position]
        if hash_carry(self._carry) != folder.lineage["hashes"]["carry"]:
            raise TaskFolderError(
                f"the carry of {folder.path} cannot be rebuilt: replaying its strategy gives other "
                "tensors (another version?); use --keep_carries all for such chains."
            )
        return self._carry, strategy

    def _begin(self) -> Strategy:
        """The strategy as it was before the first folder, and the carry that it got."""
        facts, parent = self.folders[0].lineage["strategy"], read_kept_parent(self.root)
        strategy = create_strategy(facts["name"], facts["args"])
        if parent.strategy == facts["name"]:
            strategy.load_state_dict(parent.state)
        self._strategy, self._carry, self._at = strategy, parent.carry, -1
        return strategy


def _state_behind(folder: TaskFolder, strategy: Strategy) -> Mapping[str, Tensor]:
    """The strategy's state behind a folder: read, or as the replay left it."""
    if (folder.path / "strategy.safetensors").is_file():
        return folder.read_state()
    state, recorded = strategy.state_dict(), folder.lineage["hashes"].get("strategy")
    if recorded is not None and hash_tensors(state) != recorded:
        raise TaskFolderError(
            f"the strategy's state behind {folder.path} is gone and cannot be rebuilt; "
            "chain on the last task, or use --keep_carries all for such chains."
        )
    return state


def is_replayable(strategy: Strategy) -> bool:
    """Whether end_task alone makes the strategy's state: it looks at no training step."""
    return not step_hooks_of(strategy)


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
