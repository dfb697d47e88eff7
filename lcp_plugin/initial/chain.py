"""A chain to go on from (`lcp init PHOTOS --prev CHAIN`): what the new configuration keeps of it.

Base, strategy, rank and alpha are the chain's; its tasks' names and words are taken, and folders
that it has learned are not learned twice. A file of another tool names no strategy: `recall`
rehearses it by prompts, which its header gives or the user must. A task folder or a run says all of
this in JSON; a LoRA file is read whole, as a run would read it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.network_args import parse_network_args
from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.foreign_header import named_base, read_claims
from lcp_plugin.formats.header_prompts import prompts_of_metadata
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.store.parents import find_last_folder, read_parent
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import LINEAGE, TaskFolder
from lcp_plugin.tasks import TaskRecord
from lcp_plugin.telling.wording import counted

UNSAID = "its header does not say what it knows: fill in prev_prompts, or recall cannot rehearse it"
FORM = ("network_dim", "network_alpha", "network_args", "lora_targets")  # what shapes its factors


@dataclass(frozen=True)
class Chain:
    """What is known of a chain; `base` is empty and `strategy` None where it does not say."""

    path: Path
    tasks: tuple[TaskRecord, ...]
    base: str = ""
    strategy: str | None = None
    strategy_args: tuple[str, ...] = ()
    form: Mapping[str, Any] = field(default_factory=dict)  # options of `FORM` that are known
    is_foreign: bool = False
    prompts: tuple[str, ...] = ()  # what a foreign file's header says that it knows
    learned: frozenset[Path] = frozenset()  # folders of images, where a run has noted them

    @property
    def names(self) -> tuple[str, ...]:
        """Its tasks' names, oldest first."""
        return tuple(task.name for task in self.tasks)

    @property
    def concepts(self) -> tuple[str, ...]:
        """What prompts call what it knows."""
        return self.prompts if self.is_foreign else tuple(task.concept for task in self.tasks)

    def list_words(self) -> set[str]:
        """Every word of its concepts and prompts: none of them is given to a new task."""
        texts = [text for task in self.tasks for text in (task.concept, task.train_prompt)]
        return set(re.findall(r"\w+", " ".join([*texts, *self.prompts]).lower()))

    def describe(self) -> list[str]:
        """What the new configuration goes on from, and what its user must add."""
        what = f"{counted(len(self.tasks), 'task')} ({', '.join(self.names)})"
        made = f", strategy {self.strategy}" if self.strategy else ""
        if not self.is_foreign:
            return [f"goes on from {self.path}: {what}{made}"]
        known = " and ".join(f"'{prompt}'" for prompt in self.prompts)
        says = [f"  it knows {known}, by its header"] if known else [f"  {UNSAID}"]
        return [f"goes on from {self.path}: a LoRA of another tool", *says]


def read_chain(path: Path) -> Chain:
    """What `--prev` of a run would name: a task folder, a run's folder, or a LoRA file.

    Raises:
        LineageError: nothing there, or a folder without a complete task.
        FileFormatError: a damaged or foreign file.
    """
    path = path.expanduser()
    folder = find_last_folder(path)
    return _chain_of_file(path) if folder is None else _chain_of_folder(path, folder)


def _chain_of_folder(path: Path, folder: TaskFolder) -> Chain:
    parent, base = folder.described(), folder.lineage["base"]
    return Chain(
        path=path,
        tasks=folder.records,
        base=str(base.get("origin") or base["name"] or ""),
        strategy=parent.strategy,
        strategy_args=parent.strategy_args,
        form={**_form_of(folder.lineage.get("options", {})), **_rank_of(folder.records[-1])},
        learned=_list_learned(folder.path.parent, [task.name for task in folder.records]),
    )


def _chain_of_file(path: Path) -> Chain:
    parent, metadata = read_parent(path), read_header(path).metadata
    said, records = read_claims(metadata), parent.carry.tasks
    form = {**_common_rank(parent.carry.adapter), **_form_of(said.options), **_rank_of(records[-1])}
    prompts = prompts_of_metadata(metadata) if parent.foreign else ()
    return Chain(
        path=path,
        tasks=records,
        base=parent.base_name or _base_at_hand(named_base(metadata)[0]),
        strategy=parent.strategy,
        strategy_args=parent.strategy_args,
        form=form,
        is_foreign=parent.foreign,
        prompts=prompts,
        learned=_list_learned(_run_of(path), [task.name for task in records]),
    )


def _base_at_hand(name: str) -> str:
    """A base that another tool names, if it is here or may be on the hub."""
    return name if Path(name).exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""


def _form_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that shape factors; network_args only where they are this trainer's."""
    form = {name: options[name] for name in FORM if options.get(name) is not None}
    try:
        parse_network_args(form.get("network_args", ()))
    except ConfigError:
        del form["network_args"]
    return form


def _rank_of(record: TaskRecord) -> dict[str, Any]:
    """Rank and alpha as the newest task was trained."""
    names = {"rank": "network_dim", "alpha": "network_alpha"}
    return {option: record.facts[name] for name, option in names.items() if name in record.facts}


def _common_rank(adapter: Adapter | None) -> dict[str, Any]:
    """Rank and alpha that most of a file's modules have."""
    pairs = Counter((factors.rank, factors.alpha) for factors in (adapter or Adapter()).values())
    if not pairs:
        return {}
    rank, alpha = pairs.most_common(1)[0][0]
    return {"network_dim": rank, "network_alpha": alpha}


def _list_learned(run: Path, names: Collection[str]) -> frozenset[Path]:
    """The folders that the tasks of these names were learned from, by the run's own record and
    those of the runs that it went on from.
    """
    found: set[Path] = set()
    seen: set[Path] = set()
    while run not in seen and (run / "run.json").is_file():
        seen.add(run)
        facts = RunStore(run.parent, run.name).read_run() or {}
        for name, folders in facts.get("images", {}).items():
            found |= {Path(folder).resolve() for folder in folders if name in names}
        run = _run_of(Path(facts.get("parent", {}).get("source") or ""))
    return frozenset(found)


def _run_of(source: Path) -> Path:
    """The run's folder that a task folder, a run or a deliverable belongs to."""
    if source.is_file():
        return source.with_suffix("")
    return source.parent if (source / LINEAGE).is_file() else source
