"""Chains to evaluate: which tasks, in which order, and the model after each of them.

A run's boundaries are walked once, oldest first: earlier carries, which are not kept, are rebuilt
by replaying `end_task` on the saved adapters and checked against their recorded hashes. A chain of
LoRA files is one state per file: each file holds the model after its task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lcp_plugin.biases import Change
from lcp_plugin.errors import LineageError, RunFolderError, ScoringError
from lcp_plugin.evaluation.pictures import BASE, Stage, name_weights
from lcp_plugin.evaluation.scores import CEILINGS
from lcp_plugin.formats.identity import hash_file
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.pictures import list_images
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.base_weights import BaseSource, source_of
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder, read_folder, read_parent_facts
from lcp_plugin.tasks import TaskRecord, class_words
from lcp_plugin.telling.wording import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalTask:
    """A task as evaluation sees it."""

    index: int
    name: str
    kind: str
    concept: str
    prompts: tuple[str, ...]
    references: tuple[Path, ...] = ()
    train_prompt: str = ""

    @property
    def folder(self) -> str:
        """`03_watercolor`."""
        return f"{self.index:02d}_{self.name}"

    @property
    def class_words(self) -> str:
        """The concept without its rare token: "sks stuffed animal" -> "stuffed animal"."""
        return class_words(self.kind, self.concept)


@dataclass(frozen=True)
class Chain:
    """Tasks in order and a state of the model behind each (one state for all, if joined)."""

    name: str
    path: str
    strategy: str
    base: BaseSource
    base_hash: str
    tasks: tuple[EvalTask, ...]
    stages: tuple[Stage, ...]
    seed: int | None = None
    order_seed: int | None = None
    strategy_args: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Strategy with its arguments: what runs are grouped by."""
        return " ".join([self.strategy, *self.strategy_args])

    @property
    def is_ceiling(self) -> bool:
        """Whether this is a bound and not continual learning."""
        return self.strategy in CEILINGS

    def cells(self) -> list[tuple[int, int]]:
        """(task, stage) pairs to score, from 0. Of a ceiling only what counts: `independent` right
        after each task, the other two at the end.
        """
        count, last = len(self.tasks), len(self.stages) - 1
        if not self.stages:
            return []
        if self.strategy == "independent":
            return [(i, i) for i in range(count)]
        if self.is_ceiling:
            return [(i, last) for i in range(count)]
        return [(i, j) for j in range(count) for i in range(j + 1)]

    def drawn_cells(self) -> list[tuple[int, Stage]]:
        """(task, state of the model) of every cell whose images scores need, the base's first."""
        base = base_stage(self.base_hash)
        at_base = [(i, base) for i in range(len(self.tasks))]
        return at_base + [(i, self.stages[j]) for i, j in self.cells()]


def read_chain(path: Path, references: Path | None = None) -> Chain:
    """A run's folder as a chain; earlier links of a chained run are found by their recorded paths.

    Args:
        references: a folder with one folder of images per task name; default: the images that the
            task was trained on.
    Raises:
        DataError: no finished task in it. LineageError: a damaged folder.
    """
    store = RunStore(path.parent, path.name)
    folders = store.folders()
    if not folders:
        raise RunFolderError(
            f"{path} holds no finished task; give a run's folder (output_dir/name)."
        )
    facts = store.read_run() or {}
    own = _own_chain(store, folders, facts, references)
    earlier = _earlier_chain(store, references)
    if earlier is None:
        return own
    return replace(own, tasks=(*earlier.tasks, *own.tasks), stages=(*earlier.stages, *own.stages))


def _own_chain(
    store: RunStore,
    folders: Sequence[TaskFolder],
    facts: Mapping[str, Any],
    references: Path | None,
) -> Chain:
    newest = folders[-1].lineage
    known = len(folders[0].records) - len(_new_records(store, folders[0]))
    records = folders[-1].records[known:]
    sources: Mapping[str, Sequence[str]] = facts.get("images") or {}
    replay = store.replay()
    base_hash = str(newest["base"]["hash"])
    stages = tuple(
        Stage(
            f"after {folder.path.name}",
            name_weights(base_hash, str(folder.lineage["hashes"]["carry"])),
            partial(replay.change_behind, position),  # no lambda: it goes to other processes
        )
        for position, folder in enumerate(folders)
    )
    return Chain(
        name=store.name,
        path=store.root.as_posix(),
        strategy=str(newest["strategy"]["name"]),
        strategy_args=tuple(newest["strategy"]["args"]),
        base=source_of(newest),
        base_hash=base_hash,
        tasks=tuple(_eval_task(r, sources.get(r.name, ()), references) for r in records),
        stages=stages,
        seed=facts.get("seed", newest.get("seed")),
        order_seed=facts.get("order_seed"),
    )


def _new_records(store: RunStore, first: TaskFolder) -> Sequence[TaskRecord]:
    """Of the first folder's records, those that the run itself learned."""
    parent = read_parent_facts(store.root)
    earlier = len(parent["tasks"]) if parent is not None else 0
    return first.records[earlier:]


def _earlier_chain(store: RunStore, references: Path | None) -> Chain | None:
    """The links before a chained run, if they are where they were; None otherwise."""
    facts = read_parent_facts(store.root)
    if facts is None:
        return None
    source = Path(str(facts.get("source") or ""))
    folder = source if source.is_dir() else source.parent
    run = folder.parent if read_folder(folder) is not None else folder
    if not RunStore(run.parent, run.name).folders():
        why = "a LoRA without task folders" if source.is_file() else "which is no longer there"
        logger.warning(
            "%s goes on from %s, %s: what it knows is not scored.", store.name, source, why
        )
        return None
    chain = read_chain(run, references)
    hashes = [name_weights(chain.base_hash, str(facts["parent_hash"]))]
    position = next((i for i, s in enumerate(chain.stages) if s.weights in hashes), None)
    if position is None:
        logger.warning("%s has changed since %s went on from it.", run, store.name)
        return None
    count = position + 1
    return replace(chain, tasks=chain.tasks[:count], stages=chain.stages[:count])


def _eval_task(record: TaskRecord, sources: Sequence[str], references: Path | None) -> EvalTask:
    folders = [references / record.name] if references is not None else [Path(s) for s in sources]
    images = [image for folder in folders for image in find_images(folder)]
    return EvalTask(
        record.index,
        record.name,
        record.kind,
        record.concept,
        record.prompts,
        tuple(images),
        record.train_prompt,
    )


def find_images(source: Path) -> list[Path]:
    """A folder's images, or those in its folders (`<Style>/<Object>/<n>.jpg`); an image itself."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        return []
    inner = sorted(folder for folder in source.iterdir() if folder.is_dir())
    return list_images(source) or [image for folder in inner for image in list_images(folder)]


def chain_of_adapters(files: Sequence[Path], tasks: Sequence[EvalTask], base: BaseSource) -> Chain:
    """LoRA files of any kind as a chain: file j holds the model after task j."""
    if len(files) != len(tasks):
        raise ScoringError(
            f"{counted(len(files), 'adapter')} for {counted(len(tasks), 'task')}: wanted one file "
            "per task, in order."
        )
    for file in files:
        _warn_of_another_base(file, base)
    stages = tuple(
        Stage(f"after {file.name}", name_weights(base.hash, hash_file(file)), _reader(file))
        for file in files
    )
    name = files[-1].stem
    return Chain(name, files[-1].as_posix(), "adapters", base, base.hash, tuple(tasks), stages)


def _warn_of_another_base(file: Path, base: BaseSource) -> None:
    """A LoRA runs on any SDXL base, but its scores are those of the base that it was trained on."""
    try:
        lineage = Lineage.from_metadata(read_header(file).metadata)
    except LineageError:
        return
    if lineage is not None and lineage.base_hash not in ("", base.hash):
        logger.warning(
            "%s was trained on base '%s' (%s), not on '%s' (%s).",
            file.name,
            lineage.base,
            lineage.base_hash[:10],
            base.name,
            base.hash[:10],
        )


def _reader(file: Path) -> Callable[[], Change]:
    return partial(_read_change, file)


def _read_change(file: Path) -> Change:
    return read_lora(file).change


def base_stage(base_hash: str) -> Stage:
    """The untouched base model."""
    return Stage(BASE, name_weights(base_hash, ""))


def require_references(chain: Chain) -> None:
    """DataError naming the tasks that nothing can be compared with."""
    lacking = [task.name for task in chain.tasks if not task.references]
    if lacking:
        raise ScoringError(
            f"no reference images for {', '.join(lacking)} of {chain.name}: their training folders "
            "are gone or not recorded; give --references DIR with one folder per task."
        )
