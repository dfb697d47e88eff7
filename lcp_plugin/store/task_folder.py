"""A complete task on disk, and what it is to a run that goes on from it.

adapter.safetensors   the task's own update      carry.safetensors   what the next task gets
strategy.safetensors  the strategy's state, if it has one
lineage.json          what the others are; written last: without it the folder does not exist
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.errors import TaskFolderError
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.shapes import check_shape
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.hooks import Carry
from lcp_plugin.store.carries import carry_from_tensors
from lcp_plugin.store.shapes import ADVICE, LINEAGE_SHAPE, PARENT_SHAPE
from lcp_plugin.tasks import TaskRecord

LINEAGE = "lineage.json"
PARENT = "parent"  # in a run's folder: what it started from, in the form of a task
FOLDER_FORMAT = 1  # of lineage.json and of what lies beside it


@dataclass(frozen=True)
class Parent:
    """What a run starts from."""

    carry: Carry = field(default_factory=Carry)
    strategy: str | None = None  # None: nothing of ours wrote it
    strategy_args: tuple[str, ...] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)
    base_name: str | None = None
    base_hash: str | None = None
    source: str | None = None  # where it was read, None for a first run
    hash: str | None = None  # of the carry's tensors, or of the file's
    foreign: bool = False


@dataclass(frozen=True)
class TaskFolder:
    """A complete task on disk."""

    path: Path
    lineage: Mapping[str, Any]

    @property
    def index(self) -> int:
        """Index along the chain."""
        return int(self.lineage["task"]["index"])

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.lineage["task"]["name"])

    @property
    def records(self) -> tuple[TaskRecord, ...]:
        """Every task that the model after this one has learned."""
        return tuple(TaskRecord.from_json(r) for r in self.lineage["tasks"])

    @property
    def carry_file(self) -> Path:
        """Its carry, which may have been removed."""
        return self.path / "carry.safetensors"

    def read_carry(self) -> Carry:
        """The carry as it was saved, checked against its hash."""
        tensors = self._read("carry")
        return carry_from_tensors(tensors, self.records)

    def read_adapter(self) -> Adapter:
        """The task's own update, in the factors it was trained with."""
        self._check(self.path / "adapter.safetensors", "adapter")
        return read_lora(self.path / "adapter.safetensors").adapter

    def read_state(self) -> dict[str, Tensor]:
        """The strategy's state behind this task; empty if it had none."""
        return self._read("strategy") if self.lineage["hashes"].get("strategy") else {}

    def _read(self, part: str) -> dict[str, Tensor]:
        path = self.path / f"{part}.safetensors"
        self._check(path, part)
        return {k: t.clone() for k, t in read_tensors(path).items()}

    def _check(self, path: Path, part: str) -> None:
        if not path.is_file():
            raise TaskFolderError(f"{path} is missing; restore it or chain on another task folder.")
        if file_model_hash(path) != self.lineage["hashes"].get(part):
            raise TaskFolderError(
                f"{path} is not the file that {LINEAGE} describes (hash differs); it was changed "
                "or damaged: restore it or chain on another task folder."
            )

    def described(self) -> Parent:
        """The folder as the start of another run, without its tensors."""
        facts = self.lineage
        return Parent(
            strategy=facts["strategy"]["name"],
            strategy_args=tuple(facts["strategy"]["args"]),
            base_name=facts["base"]["name"],
            base_hash=facts["base"]["hash"],
            source=str(self.path),
            hash=facts["hashes"]["carry"],
        )

    def parent(self) -> Parent:
        """The folder as the start of another run."""
        return replace(self.described(), carry=self.read_carry(), state=self.read_state())


def read_folder(path: Path) -> TaskFolder | None:
    """The task in a folder; None where no complete one is."""
    if not (path / LINEAGE).is_file():
        return None
    lineage = read_json(path / LINEAGE)
    found = lineage.get("format") if isinstance(lineage, dict) else None
    if found != FOLDER_FORMAT:
        raise TaskFolderError(
            f"{path / LINEAGE} is of format {found}, this version reads {FOLDER_FORMAT}; "
            "update lcp_plugin."
        )
    return TaskFolder(path, check_shape(lineage, LINEAGE_SHAPE, path / LINEAGE, ADVICE))


def list_folders(root: Path) -> list[TaskFolder]:
    """The complete tasks of a run in order."""
    found = [read_folder(p) for p in sorted(root.glob("[0-9]*_*")) if p.is_dir()]
    return sorted((f for f in found if f is not None), key=lambda f: f.index)


def read_parent_facts(root: Path) -> Mapping[str, Any] | None:
    """What is noted of that which the run in `root` started from; None for a first run."""
    file = root / PARENT / LINEAGE
    if not file.is_file():
        return None
    facts: Mapping[str, Any] = check_shape(read_json(file), PARENT_SHAPE, file, ADVICE)
    return facts


def read_kept_parent(root: Path) -> Parent:
    """What the run in `root` started from, as it was kept; an empty carry for a first run."""
    folder, facts = root / PARENT, read_parent_facts(root)
    if facts is None:
        return Parent()
    kept = TaskFolder(folder, facts)
    return replace(
        kept.parent(),
        source=facts["source"],
        hash=facts["parent_hash"],
        foreign=bool(facts["foreign"]),
    )
