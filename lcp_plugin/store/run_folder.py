"""Task folders, the deliverable and the state to resume from, on disk.

    <output_dir>/<name>.safetensors     the deliverable: one LoRA with every task so far
    <output_dir>/<name>/03_watercolor/  adapter, carry and strategy tensors; lineage.json last:
    without it the folder
                                        does not exist
    <output_dir>/<name>/parent/         what a chained run started from, in the same form
    <output_dir>/<name>/state/          of the task in training; state.json last
    <output_dir>/<name>/run.json        what the run is and how far it got

Tensors in safetensors, facts in JSON, nothing pickled; every write is a temporary file, fsync,
rename. With
`keep_carries = last` earlier carries are removed and rebuilt bit for bit by replaying end_task on
the adapters.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.delta import (
    Delta,
    Entry,
    Stacked,
    adapter_from_tensors,
    adapter_to_tensors,
    delta_from_tensors,
    delta_to_tensors,
)
from lcp_plugin.errors import FileFormatError, LcpError, LineageError
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.formats.identity import file_model_hash, hash_tensors, is_as_written
from lcp_plugin.formats.lineage import Lineage, collect_blocks
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.tasks import Task, TaskRecord

log = logging.getLogger(__name__)

FORMAT = 1
LINEAGE = "lineage.json"

StrategyMaker = Callable[[str, Sequence[str]], Strategy]


# ------------------------------------------------------------------------------------- carries


def carry_to_tensors(carry: Carry) -> dict[str, Tensor]:
    """Delta and adapter factors under distinct prefixes."""
    return {
        **delta_to_tensors(carry.delta, "delta/"),
        **(adapter_to_tensors(carry.adapter, "adapter/") if carry.adapter is not None else {}),
    }


def carry_from_tensors(tensors: Mapping[str, Tensor], tasks: Sequence[TaskRecord]) -> Carry:
    """The inverse of `carry_to_tensors`; the records come from lineage.json."""
    adapter = adapter_from_tensors(tensors, "adapter/")
    return Carry(delta_from_tensors(tensors, "delta/"), adapter or None, tuple(tasks))


def hash_carry(carry: Carry) -> str:
    """sha256 of the carry's tensors."""
    return hash_tensors(carry_to_tensors(carry))


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


# ------------------------------------------------------------------------------------- folders


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
            raise LineageError(f"{path} is missing; restore it or chain on another task folder.")
        if file_model_hash(path) != self.lineage["hashes"].get(part):
            raise LineageError(
                f"{path} is not the file that {LINEAGE} describes (hash differs); it was changed "
                f"or "
                "damaged: restore it or chain on another task folder."
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
    if found != FORMAT:
        raise LineageError(
            f"{path / LINEAGE} is of format {found}, this version reads {FORMAT}; update "
            f"lcp_plugin."
        )
    return TaskFolder(path, lineage)


def list_folders(root: Path) -> list[TaskFolder]:
    """The complete tasks of a run in order."""
    found = [read_folder(p) for p in sorted(root.glob("[0-9]*_*")) if p.is_dir()]
    return sorted((f for f in found if f is not None), key=lambda f: f.index)


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
        return dict(read_json(path)) if path.is_file() else None

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """run.json, whole or not at all."""
        write_json(self.root / "run.json", facts)

    def save_parent(self, parent: Parent) -> None:
        """Keeps what a chained run starts from, so that it can be resumed and evaluated alone."""
        folder = self.root / "parent"
        if (folder / LINEAGE).is_file():
            return
        self._save_tensors(folder, parent.carry, parent.state)
        write_json(
            folder / LINEAGE,
            {
                "format": FORMAT,
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
        folder = self.root / "parent"
        if not (folder / LINEAGE).is_file():
            return Parent()
        facts = read_json(folder / LINEAGE)
        kept = TaskFolder(folder, facts)
        return Parent(
            carry=kept.read_carry(),
            strategy=facts["strategy"]["name"],
            strategy_args=tuple(facts["strategy"]["args"]),
            state=kept.read_state(),
            base_name=facts["base"]["name"],
            base_hash=facts["base"]["hash"],
            source=facts["source"],
            hash=facts["parent_hash"],
            foreign=bool(facts["foreign"]),
        )

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
        folder, state = self.root / task.folder, strategy.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LINEAGE).unlink(missing_ok=True)
        write_lora(folder / "adapter.safetensors", trained, {}, torch.float32)
        self._save_tensors(folder, carry, state)
        hashes = self._hashes(folder, state)
        hashes["adapter"] = file_model_hash(folder / "adapter.safetensors")
        lineage = {
            "format": FORMAT,
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

    def carry_after(self, index: int, make_strategy: StrategyMaker) -> Carry:
        """The carry behind task `index`: read, or rebuilt bit for bit by replaying end_task.

        Raises:
            LineageError: the task, or an adapter before it, is missing, or a rebuilt carry differs
                from the recorded one.
        """
        return self.parent_at(index, make_strategy).carry

    def parent_at(self, index: int, make_strategy: StrategyMaker) -> Parent:
        """As `carry_after`, with the strategy's state behind that task: what a chain needs."""
        folders = {f.index: f for f in self.folders()}
        if index not in folders:
            raise LineageError(f"{self.root} holds no task {index}; it has {sorted(folders)}.")
        folder = folders[index]
        if folder.carry_file.is_file():
            return folder.parent()
        carry, strategy = self._replay(
            [folders[i] for i in sorted(folders) if i <= index], make_strategy
        )
        carry = Carry(carry.delta, carry.adapter, folder.records)
        if hash_carry(carry) != folder.lineage["hashes"]["carry"]:
            raise LineageError(
                f"the carry of {folder.path} cannot be rebuilt: replaying its strategy gives other "
                "tensors (another version?); use --keep_carries all for such chains."
            )
        if (folder.path / "strategy.safetensors").is_file():
            return replace(folder.described(), carry=carry, state=folder.read_state())
        state = strategy.state_dict()
        recorded = folder.lineage["hashes"].get("strategy")
        if recorded is not None and hash_tensors(state) != recorded:
            raise LineageError(
                f"the strategy's state behind {folder.path} is gone and cannot be rebuilt; "
                "chain on the last task, or use --keep_carries all for such chains."
            )
        return replace(folder.described(), carry=carry, state=state)

    def _replay(
        self, folders: Sequence[TaskFolder], make_strategy: StrategyMaker
    ) -> tuple[Carry, Strategy]:
        parent = self.read_parent()
        carry = parent.carry
        facts = folders[0].lineage["strategy"]
        strategy = make_strategy(facts["name"], facts["args"])
        if parent.strategy == facts["name"]:
            strategy.load_state_dict(parent.state)
        for folder in folders:
            carry = strategy.end_task(task_of(folder, carry), carry, folder.read_adapter())
        return carry, strategy

    # --------------------------------------------------------------------------------- state

    def save_state(
        self, task: Task, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Any
    ) -> None:
        """The state of the task in training; the one before it is removed when this one is
        whole.
        """
        folder = self.root / "state" / f"{task.folder}_step{step:08d}"
        for name, tensors in parts.items():
            write_tensors(folder / f"{name}.safetensors", tensors, None)
        hashes = {n: file_model_hash(folder / f"{n}.safetensors") for n in parts}
        write_json(
            folder / "state.json",
            {"task_index": task.index, "step": step, "hashes": hashes, "facts": facts},
        )
        for other in (self.root / "state").iterdir():
            if other not in (folder, self._kept(task)):
                shutil.rmtree(other, ignore_errors=True)

    def read_state(
        self, task: Task
    ) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(step, tensors by part, facts) of the newest whole state of this task; None without
        one.
        """
        found: tuple[int, Path, dict[str, Any]] | None = None
        for manifest in (self.root / "state").glob("*/state.json"):
            facts = read_json(manifest)
            if facts["task_index"] == task.index and (found is None or facts["step"] > found[0]):
                found = (int(facts["step"]), manifest.parent, facts)
        if found is None:
            return None
        step, folder, facts = found
        parts = {}
        for name, expected in facts["hashes"].items():
            path = folder / f"{name}.safetensors"
            if file_model_hash(path) != expected:
                raise FileFormatError(
                    f"{path} is damaged (hash differs); delete the folder state/ to restart the "
                    f"task."
                )
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
        """Whether something was learned that starting over would lose: a task, a saved state, or a
        file or state that was asked for between its steps.
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
            return read_header(self.deliverable).metadata.get("ss_lcp_carry_hash")
        except FileFormatError:
            return None


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


def deliverable_adapter(carry: Carry) -> Adapter:
    """Every module of the carry as one exact LoRA: factors that go on as they are, deltas at their
    true rank.
    """
    going_on = carry.adapter or Adapter()
    alone = going_on.without(carry.delta)
    rest = carry.total.restrict(set(carry.total) - set(alone))
    return Adapter({**rest.as_adapter(), **alone})


def lineage_of(
    carry: Carry, strategy: str, strategy_args: Sequence[str], base_name: str, base_hash: str
) -> Lineage:
    """What a deliverable's header says of the carry that it holds."""
    going_on = carry.adapter is not None and not carry.delta
    stacked = {n: e.blocks for n, e in carry.total.items() if isinstance(e, Stacked)}
    return Lineage(
        tasks=carry.tasks,
        strategy=strategy,
        strategy_args=tuple(strategy_args),
        base=base_name,
        base_hash=base_hash,
        carry="adapter" if going_on else "delta",
        carry_hash=hash_carry(carry),
        blocks=collect_blocks(stacked),
    )


def _restore_blocks(delta: Delta, lineage: Lineage) -> Delta:
    entries: dict[str, Entry] = dict(delta)
    for name, entry in delta.items():
        wanted = lineage.blocks_of(name)
        if isinstance(entry, Stacked) and sum(wanted) == entry.rank:
            entries[name] = Stacked(entry.up, entry.down, wanted, entry.kernel)
    return Delta(entries)


# ------------------------------------------------------------------------------------- parents


def read_parent(path: Path, make_strategy: StrategyMaker) -> Parent:
    """What `--prev` names: a task folder, a run folder (its last task), our deliverable, or
    anyone's SDXL LoRA.

    Raises:
        LineageError: nothing there, or a folder without a complete task.
        FileFormatError: a damaged or foreign file.
    """
    if path.is_file():
        if path.name == "carry.safetensors" and (path.parent / LINEAGE).is_file():
            path = path.parent
        else:
            return _parent_of_file(path)
    if not path.is_dir():
        raise LineageError(
            f"--prev {path} does not exist; give a task folder, a run folder or a LoRA file."
        )
    folder = read_folder(path) if path.name != "parent" else None
    if folder is None:
        inside = list_folders(path)
        if not inside:
            raise LineageError(
                f"--prev {path} holds no complete task ({LINEAGE} is written last); "
                "finish that run, or give another folder or file."
            )
        folder = inside[-1]
    if not folder.carry_file.is_file():
        run = RunStore(folder.path.parent.parent, folder.path.parent.name)
        return run.parent_at(folder.index, make_strategy)
    return folder.parent()


def _parent_of_file(path: Path) -> Parent:
    lora = read_lora(path)
    lora.adapter.check_finite()
    lora.delta.check_finite()
    try:
        lineage = Lineage.from_metadata(lora.metadata)
    except LineageError as error:
        raise LineageError(f"{path}: {error}") from error
    if lineage is None or not lineage.tasks:
        said = lora.metadata.get("ss_output_name", "None")
        name = path.stem if said in ("None", "") else said
        record = TaskRecord(1, name, "object", name, facts={"source": path.name})
        carry = Carry(lora.delta, lora.adapter or None, (record,))
        return Parent(carry, source=str(path), hash=file_model_hash(path), foreign=True)
    if not is_as_written(path, lora.metadata):
        return _changed_parent(
            path, Carry(lora.delta, lora.adapter or None, lineage.tasks), lineage
        )
    if lineage.carry == "adapter":
        carry = Carry(lora.delta, lora.adapter, lineage.tasks)
    else:
        total = _restore_blocks(lora.delta + Delta.of(lora.adapter), lineage)
        carry = Carry(total, None, lineage.tasks)
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
