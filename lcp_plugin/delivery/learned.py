"""What is exported: an adapter as a deliverable holds it, its header, and its tasks' shares.

From an additive chain single tasks can be weighed: D = sum_t w_t U_t. A file knows its tasks'
shares by the ranks that were stacked (Lineage.blocks), a run by the tasks' own adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import Biases, Change
from lcp_plugin.delivery.merging import check_range
from lcp_plugin.delta import Delta, Entry, Stacked
from lcp_plugin.errors import ConfigError, LineageError, Page, explaining
from lcp_plugin.formats.identity import file_model_hash, is_as_written
from lcp_plugin.formats.lineage import Lineage, ParentFile
from lcp_plugin.formats.lora_file import find_lora, read_lora
from lcp_plugin.sdxl.base_weights import BaseSource, check_added, source_of, sum_weights
from lcp_plugin.store.carries import deliverable_adapter
from lcp_plugin.store.deliverable_header import copied_header, derived_header, make_header
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder, list_folders, read_folder


@dataclass(frozen=True)
class Learned:
    """What is to be exported: the adapter as a deliverable holds it, and its header."""

    adapter: Adapter
    metadata: Mapping[str, str]
    updates: Mapping[str, Delta] = field(default_factory=dict)  # task -> U_t, if D is their sum
    rest: Delta = field(default_factory=Delta)  # what the chain started from, beside the updates
    read_from: ParentFile | None = None  # the file or folder, and the hash of its tensors
    base: BaseSource | None = None  # what it was trained on, where a lineage tells
    biases: Biases = field(default_factory=Biases)  # of what the chain started from

    @property
    def delta(self) -> Delta:
        """The total."""
        return Delta.of(self.adapter)

    def checkpoint_change(self) -> Change:
        """What a checkpoint gets: everything, and the base_weights that the run's base had.

        Raises:
            LineageError: a base_weights file is gone or has changed.
        """
        change = Change(self.delta, self.biases)
        if self.base is None:
            return change
        check_added(self.base)
        return change + sum_weights([(Path(path), m) for path, m, _ in self.base.added])


def read_learned(path: str | Path) -> Learned:
    """A LoRA file of any kind, a task folder, or a run folder (its last task).

    Raises:
        FileFormatError, LineageError: damaged, or nothing there.
    """
    path = Path(path)
    folder = read_folder(path) if path.is_dir() else None
    if folder is None and path.is_dir() and list_folders(path):
        folder = list_folders(path)[-1]
    if folder is not None:
        return _learned_in_run(folder)
    return _learned_in_file(path)


def _learned_in_file(path: Path) -> Learned:
    lora, file = read_lora(path), find_lora(path)
    adapter = Adapter({**lora.delta.as_adapter(), **lora.adapter})
    lineage = Lineage.from_metadata(lora.metadata)
    intact = lineage is not None and is_as_written(file, lora.metadata)
    updates = _split_blocks(adapter, lineage) if lineage is not None and intact else {}
    metadata = copied_header(lora.metadata, intact)
    read_from = ParentFile(file.name, file_model_hash(file))
    return Learned(adapter, metadata, updates, read_from=read_from, biases=lora.biases)


def _learned_in_run(folder: TaskFolder) -> Learned:
    store = RunStore(folder.path.parent.parent, folder.path.parent.name)
    folders = [f for f in store.folders() if f.index <= folder.index]
    carry = store.carry_after(folder.index)
    adapter = deliverable_adapter(carry)
    metadata = make_header(carry, adapter, folders, store.name)
    updates = {f.name: Delta.of(f.read_adapter()) for f in folders}
    rest = store.read_parent().carry.total
    if not _is_sum(carry.total, [rest, *updates.values()]):
        updates, rest = {}, Delta()
    read_from = ParentFile(folder.path.name, folder.lineage["hashes"]["carry"])
    trained_on = source_of(folder.lineage)
    return Learned(adapter, metadata, updates, rest, read_from, trained_on, carry.biases)


def _is_sum(total: Delta, parts: list[Delta]) -> bool:
    """Whether the parts add up to the total, within fp32."""
    names = set(total).union(*parts)
    for name in names:
        present = [p[name].dense() for p in parts if name in p]
        wanted = total[name].dense() if name in total else torch.zeros(())
        found = torch.stack(present).sum(0) if present else torch.zeros(())
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-6):
            return False
    return True


def _split_blocks(adapter: Adapter, lineage: Lineage) -> dict[str, Delta]:
    """Each task's update, if every module stacks one block per task; else nothing."""
    names = [task.name for task in lineage.tasks]
    shares: dict[str, dict[str, Entry]] = {name: {} for name in names}
    for module, factors in adapter.items():
        blocks = lineage.blocks_of(module)
        if len(blocks) != len(names) or sum(blocks) != factors.rank or len(set(names)) < len(names):
            return {}
        start = 0
        for name, rank in zip(names, blocks, strict=True):
            part = slice(start, start + rank)
            up = factors.up[:, part] * factors.scale
            shares[name][module] = Stacked(up, factors.down[part], (rank,), factors.kernel)
            start += rank
    return {name: Delta(entries) for name, entries in shares.items()}


def _why_not_apart(task: str, learned: Learned, lineage: Lineage | None) -> str:
    """Why a task that the lineage names has no share of its own."""
    strategy = lineage.strategy if lineage else "?"
    start = f"the share of {task} is not kept apart here: "
    if learned.updates:
        return f"{start}it was learned before this run; weigh it where it was learned."
    if strategy in ("merge_init", "merge_ortho_init"):
        return (
            f"{start}the file's factors are not those of its tasks one after another (truncated, "
            "mixed by another tool, or started from a LoRA without lineage); use the run that "
            "learned it."
        )
    return f"{start}strategy {strategy} does not sum its tasks' updates."


@explaining(Page.FORMS, LineageError)
def weigh_tasks(learned: Learned, weights: Mapping[str, float]) -> Learned:
    """The same tasks with other weights; 0 leaves one out.

    Raises:
        ConfigError: a task that is not there.
        LineageError: the chain is no sum of its tasks' updates.
    """
    lineage = Lineage.from_metadata(learned.metadata)
    known = [task.name for task in lineage.tasks] if lineage else []
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise ConfigError(
            f"--weights {unknown[0]}: there is no such task; known are "
            f"{', '.join(known) or 'none: the file has no lineage of ours'}."
        )
    inherited = sorted(set(weights) - set(learned.updates))
    if inherited:
        raise LineageError(_why_not_apart(inherited[0], learned, lineage))
    total = learned.rest
    for name, update in learned.updates.items():
        total = total + update.weighted(weights.get(name, 1.0))
    check_range(total)
    kept = Delta({name: entry for name, entry in total.items() if entry.norm() > 0})
    if not kept and not learned.biases:
        raise ConfigError("--weights: nothing is left; give one task a weight other than 0.")
    metadata = derived_header(learned.metadata, learned.read_from, weights=dict(weights))
    return Learned(kept.as_adapter(), metadata, read_from=learned.read_from, biases=learned.biases)
