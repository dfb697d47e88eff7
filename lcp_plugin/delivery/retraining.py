"""TOML that would train a file, a task folder or a run again, as far as it is known.

A header tells options and folders' names, but not where images lie: each task has a line to fill
in. A run's folder knows that too. What this trainer does not have (LyCORIS' modules, options of
other tools) stands in comments, so that the rest can be trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import convert_option
from lcp_plugin.config.optimizer_table import name_of_class
from lcp_plugin.config.options import option_fields, option_types
from lcp_plugin.delivery.chain_tree import one_line
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.foreign_header import Claims, read_claims
from lcp_plugin.formats.lineage import Lineage, ParentFile
from lcp_plugin.formats.shapes import has_shape
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.store.data_facts import SUBSET_FACTS
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder, list_folders, read_folder
from lcp_plugin.tasks import TaskRecord

_NOT_AGAIN = ("prev", "output_dir", "overwrite", "config", "config_file", "dry_run", "resume")
_OWN_DATA = ("train_data_dir", "dataset_config", "in_json")  # a single task's images
_DATASET_FACTS = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso")


@dataclass(frozen=True)
class KnownTraining:
    """What is known of a training."""

    name: str  # of the file or folder
    options: Mapping[str, Any]
    tasks: Sequence[TaskRecord]
    parents: Sequence[ParentFile] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # task -> its options
    images: Mapping[str, Sequence[str]] = field(default_factory=dict)  # task -> folders
    datasets: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # in tables


def retraining_config(path: str | Path) -> str:
    """TOML that would train a file or a folder again.

    Raises:
        FileFormatError: as `read_header`.  LineageError: nothing is said of training.
    """
    path = Path(path)
    known = _known_of_folder(path) if path.is_dir() else _known_of_file(path)
    lines = [f"# trains {known.name} again, as far as is known"]
    for parent in known.parents:
        lines.append(f"# it was made from {one_line(parent.name)} ({parent.hash[:12]}): see --prev")
    for name, value in sorted(known.options.items()):
        lines += _option_lines(name, value)
    if len(known.tasks) == 1 and any(known.options.get(name) for name in _OWN_DATA):
        return "\n".join(lines) + "\n"  # it names its images itself
    for task in known.tasks:
        lines += ["", "[[tasks]]", *_task_lines(task, known)]
    return "\n".join(lines) + "\n"


def _known_of_file(path: Path) -> KnownTraining:
    metadata = read_header(path).metadata
    claims, lineage = read_claims(metadata), Lineage.from_metadata(metadata)
    options = dict(claims.options)
    if "optimizer_type" in options:
        options["optimizer_type"] = name_of_class(options["optimizer_type"])
    if lineage is not None and lineage.options:  # our trainer's: all that differed from defaults
        options = dict(lineage.options)
    if not options and not claims.triggers:
        raise LineageError(f"the header of {path} says nothing about how it was trained.")
    options.setdefault("output_name", f"{path.stem}_again")
    if lineage is None:
        tasks, datasets = _tasks_of(claims, metadata, path)
        return KnownTraining(path.name, _again(options), tasks, datasets=datasets)
    if lineage.base:
        options["pretrained_model_name_or_path"] = lineage.base
    options |= _strategy_options(lineage.trained_by, lineage.strategy_args)
    options |= {name: value for name, value in lineage.seeds.items() if value is not None}
    return KnownTraining(path.name, _again(options), lineage.tasks, lineage.parents)


def _known_of_folder(path: Path) -> KnownTraining:
    """Of a task folder that task, of a run's folder all its tasks."""
    alone = read_folder(path)
    folders = [alone] if alone is not None else list_folders(path)
    if not folders:
        raise LineageError(f"{path} holds no complete task; give a task folder, a run or a file.")
    root = folders[0].path.parent
    run = RunStore(root.parent, root.name).read_run() or {}
    newest, parent = folders[-1].lineage, folders[0].lineage.get("parent", {})
    common = dict(run.get("options") or newest.get("options", {}))
    strategy = newest["strategy"]
    options = {
        **common,
        "pretrained_model_name_or_path": newest["base"].get("origin") or newest["base"]["name"],
        "seed": newest.get("seed"),
        **_strategy_options(strategy["name"], strategy["args"]),
    }
    options.setdefault("output_name", f"{path.name}_again")
    records = {name: r for folder in folders for name, r in _own_records(folder).items()}
    source = ParentFile(Path(str(parent.get("source"))).name, str(parent.get("hash")))
    sets = {f.name: f.lineage.get("data", {}) for f in folders}
    return KnownTraining(
        name=path.name,
        options=_again(options),
        tasks=list(records.values()),
        parents=[source] if parent.get("hash") else [],
        overrides={f.name: _overrides(f, common) for f in folders},
        images=run.get("images", {}),
        datasets={n: d["datasets"] for n, d in sets.items() if d.get("tables")},
    )


def _own_records(folder: TaskFolder) -> dict[str, TaskRecord]:
    """The tasks that a folder added to its chain, by name."""
    count = max(1, len(folder.records)) if folder.path.name.endswith("_joint") else 1
    return {record.name: record for record in folder.records[-count:]}


def _overrides(folder: TaskFolder, common: Mapping[str, Any]) -> dict[str, Any]:
    """A task's own options, where they differ from the run's."""
    own = folder.lineage.get("options", {})
    fields = option_fields()
    return {
        name: own[name]
        for name in own
        if name in fields and fields[name].metadata["per_task"] and own[name] != common.get(name)
    }


def _strategy_options(name: str | None, args: Sequence[str]) -> dict[str, Any]:
    return {"strategy": name, "strategy_args": list(args)} if name else {}


def _again(options: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in options.items() if n not in _NOT_AGAIN and v is not None}


# ------------------------------------------------------------------------------ another's tasks


def _tasks_of(
    claims: Claims, metadata: Mapping[str, str], path: Path
) -> tuple[tuple[TaskRecord, ...], dict[str, Sequence[Mapping[str, Any]]]]:
    """The task of a foreign file, and its data sets where one folder does not say it all.

    sd-scripts trains all folders together: one task.
    """
    folders = list(claims.datasets)
    words = [re.sub(r"^\d+_", "", Path(name).name) for name in folders]
    word = next(iter(words or claims.triggers), path.stem)
    facts = {"trained on": "; ".join(f"{n}: {c}" for n, c in claims.datasets.items())}
    task = TaskRecord(1, word, "object", word, facts=facts if folders else {})
    sets = _json_list(metadata.get("ss_datasets"))
    if not sets and len(folders) > 1:
        dirs = json.loads(metadata["ss_dataset_dirs"])
        if has_shape(dirs, {name: dict for name in folders}):
            sets = [{"subsets": [_subset_of(name, dirs[name]) for name in folders]}]
    return (task,), {task.name: sets} if sets else {}


def _subset_of(folder: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A folder of kohya's as a subset: its name holds the class tokens."""
    words = re.sub(r"^\d+_", "", folder)
    return {"image_dir": folder, "num_repeats": facts.get("n_repeats", 1), "class_tokens": words}


def _json_list(text: str | None) -> list[Mapping[str, Any]]:
    try:
        value = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return []
    return (
        [d for d in value if has_shape(d, {"subsets": [dict]})] if isinstance(value, list) else []
    )


# --------------------------------------------------------------------------------------- lines


def _option_lines(name: str, value: Any) -> list[str]:
    """An option's line; a comment for what is no option here, or has no such value."""
    fields = option_fields()
    text = f"{name} = {toml_value(value)}"
    if name not in fields:
        return [one_line(f"# {text}  # no option here")]
    try:
        convert_option(fields[name], option_types()[name], value)
    except ValueError as error:
        return [one_line(f"# {text}  # not trained here: {error}")]
    return [text]


def _task_lines(task: TaskRecord, known: KnownTraining) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", task.name).strip("._-") or f"task{task.index}"
    values: dict[str, Any] = {"name": name, "kind": task.kind, "concept": task.concept}
    if task.train_prompt:
        values["train_prompt"] = task.train_prompt
    if task.prompts:
        values["eval_prompts"] = list(task.prompts)
    values |= known.overrides.get(task.name, {})
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items()]
    folders = list(known.images.get(task.name, ()))
    if known.datasets.get(task.name):
        return [*lines, *_dataset_lines(known.datasets[task.name], folders)]
    if folders:
        return [*lines, f"image_dir = {toml_value(folders if len(folders) > 1 else folders[0])}"]
    said = ", ".join(f"{k} {v}" for k, v in task.facts.items() if isinstance(v, str | int))
    return [*lines, one_line(f'image_dir = ""  # fill in; recorded: {said or "nothing"}')]


def _dataset_lines(sets: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """[[tasks.datasets]] of data sets as ss_datasets tells of them; `folders`: where the training
    images of their subsets lie, in order, if that is known.
    """
    lines: list[str] = []
    places = iter(folders)
    for dataset in sets:
        lines += ["", "[[tasks.datasets]]"]
        values = {"batch_size": dataset.get("batch_size_per_device")}
        values |= {name: dataset.get(name) for name in _DATASET_FACTS}
        lines += _told(values)
        for subset in dataset["subsets"]:
            place = None if subset.get("is_reg") else next(places, None)
            lines += ["", "[[tasks.datasets.subsets]]", *_subset_lines(subset, place)]
    return lines


def _subset_lines(subset: Mapping[str, Any], place: str | None) -> list[str]:
    names = (*SUBSET_FACTS, "class_tokens", "is_reg")
    values = {name: subset.get(name) for name in names if subset.get(name) != ""}
    folder = subset.get("image_dir") or subset.get("metadata_file") or "?"
    where = f"image_dir = {toml_value(place)}"
    if place is None:
        where = one_line(f'image_dir = ""  # fill in; it was {folder}')
    return [where, *_told({name: value for name, value in values.items() if value is not False})]


def _told(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {toml_value(value)}" for name, value in values.items() if value is not None]


def toml_value(value: Any) -> str:
    """A value in TOML's words: booleans, numbers, text, lists of these."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value if v is not None) + "]"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(str(k))} = {toml_value(v)}" for k, v in value.items())
            + "}"
        )
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
