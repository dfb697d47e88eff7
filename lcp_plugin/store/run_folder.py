"""One run's folder and its deliverable: tasks, what it started from, and the state to resume from.

    <output_dir>/<name>.safetensors     the deliverable: one LoRA with every task so far
    <output_dir>/<name>/03_watercolor/  a complete task (task_folder.py)
    <output_dir>/<name>/parent/         what a chained run started from, in the same form
    <output_dir>/<name>/state/          of the task in training; state.json last
    <output_dir>/<name>/run.json        what the run is and how far it got

Tensors in safetensors, facts in JSON, nothing pickled; every write is a temporary file, fsync,
rename. With `keep_carries = last` earlier carries are removed and rebuilt bit for bit by replaying
end_task on the adapters (replay.py).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.errors import FileFormatError, LcpError, TaskFolderError
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.formats.identity import file_model_hash, hash_tensors
from lcp_plugin.formats.lineage import carry_hash_of
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.shapes import check_shape
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.store.carries import carry_to_tensors
from lcp_plugin.store.replay import Replay, is_replayable
from lcp_plugin.store.shapes import ADVICE, RUN_SHAPE, STATE_SHAPE
from lcp_plugin.store.task_folder import (
    FOLDER_FORMAT,
    LINEAGE,
    PARENT,
    Parent,
    TaskFolder,
    list_folders,
    read_kept_parent,
)
from lcp_plugin.tasks import Task

RESTART = "delete the folder state/ to restart the task."


class RunStore:
    """One run's folder."""

    def __init__(self, output_dir: Path, name: str) -> None:
        self.output_dir, self.name = output_dir, name
        self.root = output_dir / name
        self.deliverable = output_dir / f"{name}.safetensors"

    def folders(self) -> list[TaskFolder]:
        """The complete tasks in order."""
        return list_folders(self.root)

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None."""
        path = self.root / "run.json"
        if not path.is_file():
            return None
        return dict(check_shape(read_json(path), RUN_SHAPE, path, ADVICE))

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """run.json, whole or not at all."""
        write_json(self.root / "run.json", facts)

    def save_parent(self, parent: Parent) -> None:
        """Keeps what a chained run starts from, so that it can be resumed and evaluated alone."""
        folder = self.root / PARENT
        if (folder / LINEAGE).is_file():
            return
        self._save_tensors(folder, parent.carry, parent.state)
        write_json(
            folder / LINEAGE,
            {
                "format": FOLDER_FORMAT,
                "task": parent.carry.tasks[-1].to_json() if parent.carry.tasks else None,
                "tasks": [r.to_json() for r in parent.carry.tasks],
                "strategy": {"name": parent.strategy, "args": list(parent.strategy_args)},
                "base": {"name": parent.base_name, "hash": parent.base_hash},
                "source": parent.source,
                "parent_hash": parent.hash,
                "foreign": parent.foreign,
                "hashes": self._hashes(folder, parent.state),
            },
        )

    def read_parent(self) -> Parent:
        """What the run started from; an empty carry for a first run."""
        return read_kept_parent(self.root)

    def save_task(
        self,
        task: Task,
        trained: Adapter,
        carry: Carry,
        strategy: Strategy,
        facts: Mapping[str, Any],
        keep_carries: str = "last",
    ) -> TaskFolder:
        """Writes a finished task: tensors first, lineage.json last, earlier carries away after it.

        Raises:
            NumericError: a value is not finite; nothing is written.
            DiskError: no space; what was there before is whole.
        """
        trained.check_finite()
        carry.delta.check_finite()
        carry.biases.check_finite()
        folder, state = self.root / task.folder, strategy.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LINEAGE).unlink(missing_ok=True)
        write_lora(folder / "adapter.safetensors", trained, {}, torch.float32)
        self._save_tensors(folder, carry, state)
        hashes = self._hashes(folder, state)
        hashes["adapter"] = file_model_hash(folder / "adapter.safetensors")
        lineage = {
            "format": FOLDER_FORMAT,
            "task": carry.tasks[-1].to_json(),
            "tasks": [r.to_json() for r in carry.tasks],
            "hashes": hashes,
            **facts,
        }
        write_json(folder / LINEAGE, lineage)
        if keep_carries == "last":
            self._remove_carries(task.index, states=is_replayable(strategy))
        return TaskFolder(folder, lineage)

    def _save_tensors(self, folder: Path, carry: Carry, state: Mapping[str, Tensor]) -> None:
        write_tensors(folder / "carry.safetensors", carry_to_tensors(carry), None)
        if state:
            write_tensors(folder / "strategy.safetensors", state, None)
        else:
            (folder / "strategy.safetensors").unlink(missing_ok=True)

    @staticmethod
    def _hashes(folder: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
        parts = ["carry", *(["strategy"] if state else [])]
        return {p: file_model_hash(folder / f"{p}.safetensors") for p in parts}

    def _remove_carries(self, before: int, states: bool) -> None:
        """Earlier carries, and states of the strategy that replaying end_task gives again."""
        for folder in self.folders():
            if folder.index < before:
                folder.carry_file.unlink(missing_ok=True)
                if states:
                    (folder.path / "strategy.safetensors").unlink(missing_ok=True)

    def carry_after(self, index: int) -> Carry:
        """The carry behind task `index`: read, or rebuilt bit for bit by replaying end_task.

        Raises:
            LineageError: the task, or an adapter before it, is missing, or a rebuilt carry differs
                from the recorded one.
        """
        return self.replay().carry_behind(self._position_of(index))

    def parent_at(self, index: int) -> Parent:
        """What a chain needs of task `index`: its carry, and the strategy's state behind it."""
        return self.replay().parent_behind(self._position_of(index))

    def replay(self) -> Replay:
        """The carries behind all tasks, one after the other."""
        return Replay(self.root, self.folders())

    def _position_of(self, index: int) -> int:
        known = [folder.index for folder in self.folders()]
        if index not in known:
            raise TaskFolderError(f"{self.root} holds no task {index}; it has {known}.")
        return known.index(index)

    # --------------------------------------------------------------------------------- state

    def save_state(
        self, task: Task, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Any
    ) -> None:
        """The state of the task in training; the one before it goes when this one is whole."""
        folder = self.root / "state" / f"{task.folder}_step{step:08d}"
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors, None)
        hashes = {n: file_model_hash(folder / f"{n}.safetensors") for n in parts}
        manifest = {"task_index": task.index, "step": step, "hashes": hashes, "facts": facts}
        write_json(folder / "state.json", manifest, indent=None)
        for other in (self.root / "state").iterdir():
            if other not in (folder, self._kept(task)):
                shutil.rmtree(other, ignore_errors=True)

    def read_state(
        self, task: Task
    ) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(step, tensors by part, facts) of this task's newest whole state; None without one."""
        found: tuple[int, Path, dict[str, Any]] | None = None
        for manifest in (self.root / "state").glob("*/state.json"):
            facts = check_shape(read_json(manifest), STATE_SHAPE, manifest, RESTART)
            if facts["task_index"] == task.index and (found is None or facts["step"] > found[0]):
                found = (int(facts["step"]), manifest.parent, facts)
        if found is None:
            return None
        step, folder, facts = found
        parts = {}
        for name, expected in facts["hashes"].items():
            path = folder / f"{name}.safetensors"
            if file_model_hash(path) != expected:
                raise FileFormatError(f"{path} is damaged (hash differs); {RESTART}")
            parts[name] = {k: t.clone() for k, t in read_tensors(path).items()}
        return step, parts, facts["facts"]

    def _kept(self, task: Task) -> Path:
        return self.root / "state" / f"{task.folder}_kept"

    def write_kept(self, task: Task, name: str, tensors: Mapping[str, Tensor]) -> None:
        """What was made for the task's training and need not be made again."""
        hashed = {"hash": hash_tensors(tensors)}
        write_tensors(self._kept(task) / f"{name}.safetensors", tensors, hashed)

    def read_kept(self, task: Task, name: str) -> dict[str, Tensor] | None:
        """What `write_kept` left; None where nothing whole is there."""
        path = self._kept(task) / f"{name}.safetensors"
        try:
            recorded = read_header(path).metadata.get("hash")
            tensors = {k: t.clone() for k, t in read_tensors(path).items()}
        except (OSError, LcpError):
            return None
        return tensors if hash_tensors(tensors) == recorded else None

    def holds_work(self) -> bool:
        """Whether something was learned that starting over would lose.

        That is a task, a saved state, or a file or state that was asked for between its steps.
        """
        kept = (self.root.glob("[0-9]*_*/lineage.json"), self.root.glob("state/*/state.json"))
        interim = re.compile(
            rf"{re.escape(self.name)}(-\d+_.+)?(-step\d+|-\d+)?(-state|\.safetensors)"
        )
        files_made = (p for p in self.output_dir.glob("*") if interim.fullmatch(p.name))
        return any(True for found in (*kept, files_made) for _ in found)

    def clear_state(self) -> None:
        """Removes the state: its task is complete."""
        shutil.rmtree(self.root / "state", ignore_errors=True)

    # --------------------------------------------------------------------------- deliverable

    def delivered_hash(self) -> str | None:
        """The carry hash that the deliverable on disk records; None without a readable one."""
        if not self.deliverable.is_file():
            return None
        try:
            return carry_hash_of(read_header(self.deliverable).metadata)
        except FileFormatError:
            return None
