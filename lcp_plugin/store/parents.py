"""What `--prev` names, as the start of a run.

A task folder and our own deliverable give strategy, state and base with the carry; anyone's SDXL
LoRA gives its update alone, and so does a file of ours that another tool has changed since.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lcp_plugin.delta import Delta
from lcp_plugin.errors import LineageError, TaskFolderError
from lcp_plugin.formats.identity import file_model_hash, is_as_written
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.hooks import Carry
from lcp_plugin.store.carries import restore_blocks
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import (
    LINEAGE,
    PARENT,
    Parent,
    TaskFolder,
    list_folders,
    read_folder,
)
from lcp_plugin.tasks import TaskRecord

log = logging.getLogger(__name__)


def read_parent(path: Path) -> Parent:
    """What `--prev` names: a task folder, a run folder (its last task), our deliverable, or
    anyone's SDXL LoRA.

    Raises:
        LineageError: nothing there, or a folder without a complete task.
        FileFormatError: a damaged or foreign file.
    """
    folder = find_last_folder(path)
    if folder is None:
        return _parent_of_file(path)
    if not folder.carry_file.is_file():
        run = RunStore(folder.path.parent.parent, folder.path.parent.name)
        return run.parent_at(folder.index)
    return folder.parent()


def find_last_folder(path: Path) -> TaskFolder | None:
    """The task folder that `--prev` names, a run's last one; None where it names a LoRA file.

    Raises:
        LineageError: nothing there, or a folder without a complete task.
    """
    if path.is_file():
        if path.name != "carry.safetensors" or not (path.parent / LINEAGE).is_file():
            return None
        path = path.parent
    if not path.is_dir():
        raise LineageError(
            f"--prev {path} does not exist; give a task folder, a run folder or a LoRA file."
        )
    folder = read_folder(path) if path.name != PARENT else None
    if folder is None:
        inside = list_folders(path)
        if not inside:
            raise TaskFolderError(
                f"--prev {path} holds no complete task ({LINEAGE} is written last); "
                "finish that run, or give another folder or file."
            )
        folder = inside[-1]
    return folder


def _parent_of_file(path: Path) -> Parent:
    lora = read_lora(path)
    lora.adapter.check_finite()
    lora.delta.check_finite()
    lora.biases.check_finite()
    try:
        lineage = Lineage.from_metadata(lora.metadata)
    except LineageError as error:
        raise LineageError(f"{path}: {error}") from error
    if lineage is None or not lineage.tasks:
        said = lora.metadata.get("ss_output_name", "None")
        name = path.stem if said in ("None", "") else said
        record = TaskRecord(1, name, "object", name, facts={"source": path.name})
        carry = Carry(lora.delta, lora.adapter or None, (record,), lora.biases)
        return Parent(carry, source=str(path), hash=file_model_hash(path), foreign=True)
    if not is_as_written(path, lora.metadata):
        return _changed_parent(
            path, Carry(lora.delta, lora.adapter or None, lineage.tasks, lora.biases), lineage
        )
    if lineage.carry == "adapter":
        carry = Carry(lora.delta, lora.adapter, lineage.tasks, lora.biases)
    else:
        total = restore_blocks(lora.delta + Delta.of(lora.adapter), lineage)
        carry = Carry(total, None, lineage.tasks, lora.biases)
    return Parent(
        carry=carry,
        strategy=lineage.trained_by,
        strategy_args=lineage.strategy_args if lineage.trained_by else (),
        base_name=lineage.base or None,
        base_hash=lineage.base_hash or None,
        source=str(path),
        hash=file_model_hash(path),
    )


def _changed_parent(path: Path, carry: Carry, lineage: Lineage) -> Parent:
    """A file of ours whose tensors another tool has changed: the tasks and the base it names still
    hold, how its ranks were stacked and which strategy may go on from it do not.
    """
    log.warning(
        "%s: another tool changed its tensors since they were written (their hash differs), so it "
        "is taken as any foreign LoRA: no record of each task's ranks, and no strategy.",
        path,
    )
    return Parent(
        carry=carry,
        base_name=lineage.base or None,
        base_hash=lineage.base_hash or None,
        source=str(path),
        hash=file_model_hash(path),
        foreign=True,
    )
