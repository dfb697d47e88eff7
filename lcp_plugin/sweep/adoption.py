"""A run that begins with another's first tasks: its adapters as they are, its carries formed anew.

Only where both strategies would have begun the first task alike, tried on a small specification.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.adapter import AdapterSpec
from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.formats.disk import write_json
from lcp_plugin.hooks import Carry, TaskStart
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.replay import task_of
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder
from lcp_plugin.tasks import Task


def adopt_tasks(source: RunStore, arguments: Sequence[str], count: int = 1) -> int:
    """Begins a run with another's first tasks: the trained adapters as they are, the carries as the
    new run's strategy forms them. Returns how many were taken over; 0 where the strategies would
    have begun the first task differently.
    """
    config = load_config(list(arguments))
    options = config.options
    known, folders = source.read_run(), source.folders()[:count]
    if known is None or not folders or not _begin_alike(folders[0], config):
        return 0
    strategy = create_strategy(options.strategy, options.strategy_args)
    target = RunStore(Path(str(options.output_dir)), str(options.output_name))
    carry, before = Carry(), None
    for folder in folders:
        task, trained = task_of(folder, carry), folder.read_adapter()
        carry = strategy.end_task(task, carry, trained).noting(**folder.records[-1].facts)
        facts = _adopted_facts(folder, config, before)
        saved = target.save_task(task, trained, carry, strategy, facts, options.keep_carries)
        before = saved.lineage["hashes"]["carry"]
    _adopt_samples(source, target, folders[:1])
    write_json(target.root / "run.json", _adopted_run(known, config, target))
    return len(folders)


def _adopted_facts(folder: TaskFolder, config: RunConfig, before: str | None) -> dict[str, Any]:
    """The leader's lineage but for what is the run's own."""
    own = {"format", "task", "tasks", "hashes"}
    facts = {key: value for key, value in folder.lineage.items() if key not in own}
    options = config.options
    return facts | {
        "strategy": {"name": options.strategy, "args": list(options.strategy_args)},
        "parent": {"hash": before, "source": folder.lineage["parent"]["source"]},
        "adopted_from": folder.path.as_posix(),
    }


def _adopted_run(known: Mapping[str, Any], config: RunConfig, target: RunStore) -> dict[str, Any]:
    """A run.json that the training command resumes from."""
    keys = ("format", "base", "seed", "tasks", "images", "sessions", "base_sampled")
    kept = {key: known[key] for key in keys if key in known}
    return kept | {
        "name": target.name,
        "fingerprint": config.fingerprint(),
        "status": "running",
        "ended": [],
        "said": [],
    }


def _adopt_samples(source: RunStore, target: RunStore, folders: Sequence[TaskFolder]) -> None:
    """The base's samples and those behind the first task: the same model drew them."""
    for stage in ("00_base", *(folder.path.name for folder in folders)):
        images = source.root / "samples" / stage
        if images.is_dir():
            shutil.copytree(images, target.root / "samples" / stage, dirs_exist_ok=True)


def _begin_alike(folder: TaskFolder, config: RunConfig) -> bool:
    """Whether both strategies start a first task from the same factors on an untouched base."""
    theirs, ours = folder.lineage["strategy"], config.options
    spec = AdapterSpec({"unet.probe": (4, 6)}, rank=2, alpha=2.0, seed=1)
    task = Task(1, "probe", "object", "probe", ())
    starts = []
    for name, arguments in (
        (theirs["name"], theirs["args"]),
        (ours.strategy, ours.strategy_args),
    ):
        strategy = create_strategy(name, arguments)
        starts.append(strategy.begin_task(task, Carry(), spec))
    return _equal_starts(*starts)


def _equal_starts(a: TaskStart, b: TaskStart) -> bool:
    if a.base or b.base or a.trainable != b.trainable or a.adapter.keys() != b.adapter.keys():
        return False
    return all(
        torch.equal(a.adapter[n].down, b.adapter[n].down)
        and torch.equal(a.adapter[n].up, b.adapter[n].up)
        for n in a.adapter
    )
