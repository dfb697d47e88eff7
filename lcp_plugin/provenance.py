"""Where a LoRA file, a task folder or a run comes from: its chain as a tree, its hashes verified.

Headers are data: no path in them is followed. Parents are looked for by tensor hash, in the
folder of the file and in the folders that the caller names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcp_plugin.config.options import Options
from lcp_plugin.errors import FileFormatError, LcpError, LineageError
from lcp_plugin.files import Header, file_model_hash, read_header, read_json
from lcp_plugin.keys import parse_key
from lcp_plugin.lineage import (
    Lineage,
    Source,
    Summary,
    kohya_header,
    modelspec_header,
    summarise,
    tag_frequency,
)
from lcp_plugin.store import LINEAGE, TaskFolder, list_folders, read_folder
from lcp_plugin.tasks import TaskRecord

MAX_SEARCHED = 500  # files looked at for a parent


@dataclass(frozen=True)
class Check:
    """One hash that was recorded, and what became of it."""

    what: str
    state: str  # verified | differs | not found | not kept | not checked ...
    hash: str

    def __str__(self) -> str:
        return f"{self.what} {self.hash[:12]}: {self.state}"


@dataclass(frozen=True)
class Node:
    """A file or folder in the tree of a chain."""

    title: str
    lines: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    children: tuple[Node, ...] = ()

    def all_checks(self) -> list[Check]:
        """Of this node and everything below it."""
        return [*self.checks, *(c for child in self.children for c in child.all_checks())]

    def render(self, indent: str = "") -> list[str]:
        """The tree as lines of text."""
        text = [f"{indent}{self.title}"]
        text += [f"{indent}  {line}" for line in (*self.lines, *map(str, self.checks))]
        for child in self.children:
            text += child.render(indent + "    ")
        return text


@dataclass(frozen=True)
class Search:
    """Where parents and bases are looked for."""

    folders: tuple[Path, ...] = ()
    base_hash: str = ""  # of the base that the caller has; empty: none given
    seen: frozenset[str] = field(default_factory=frozenset)  # hashes on the way here


def trace(path: str | Path, search: Search | None = None) -> Node:
    """The tree of a deliverable, anyone's LoRA, a task folder or a run folder.

    Raises:
        FileFormatError: no such file, or damaged.  LineageError: a folder that holds no task.
    """
    path = Path(path)
    search = search or Search()
    if path.is_file():
        return _trace_file(path, search)
    folder = read_folder(path) if path.is_dir() else None
    if folder is not None:
        return _trace_task(folder)
    tasks = list_folders(path) if path.is_dir() else []
    if not tasks:
        raise LineageError(f"{path} is neither a file nor a folder with a complete task in it.")
    return Node(f"{path}: run of {len(tasks)} tasks", children=tuple(map(_trace_task, tasks)))


def _trace_file(path: Path, search: Search) -> Node:
    header = read_header(path)
    summary = summarise(header.metadata)
    actual = file_model_hash(path)
    checks = []
    claimed = header.metadata.get("sshs_model_hash")
    if claimed:
        checks.append(Check("tensors", "verified" if claimed == actual else "differs", claimed))
    lines = [_describe_tensors(path, header), *_describe_summary(summary)]
    if not claimed:
        lines.append(f"hash {actual[:12]} (of its tensors; none recorded)")
    lineage = Lineage.from_metadata(header.metadata)
    children: list[Node] = []
    if lineage is not None:
        lines += _describe_lineage(lineage)
        checks += _check_base(lineage.base_hash, search)
        children = _trace_tasks_of(path, lineage, checks)
        deeper = Search(search.folders, search.base_hash, search.seen | {actual})
        children += [_trace_parent(p.name, p.hash, path, deeper) for p in lineage.parents]
    return Node(str(path), tuple(lines), tuple(checks), tuple(children))


def _describe_tensors(path: Path, header: Header) -> str:
    keys = [(parse_key(name), info) for name, info in header.tensors.items()]
    modules = {key.module for key, _ in keys if key}
    ranks = {info.shape[0] for key, info in keys if key and key.part == "down" and info.shape}
    rank = f", rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "") if ranks else ""
    size = path.stat().st_size / 1e6
    return f"{len(modules)} modules{rank}, {size:.1f} MB"


def _describe_summary(summary: Summary) -> list[str]:
    named = {
        "made by": summary.tool,
        "title": summary.title,
        "date": summary.date,
        "base": summary.base,
        "trigger words": ", ".join(summary.triggers),
        "trained on": "; ".join(f"{n} ({c})" for n, c in summary.datasets.items()),
    }
    return [_one_line(f"{name}: {value}") for name, value in named.items() if value]


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 300 else text[:297] + "..."


def _describe_lineage(lineage: Lineage) -> list[str]:
    args = f" ({', '.join(lineage.strategy_args)})" if lineage.strategy_args else ""
    lines = [f"strategy: {lineage.strategy}{args}"] if lineage.strategy else []
    for name, table in (("seeds", lineage.seeds), ("versions", lineage.versions)):
        if table:
            lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in table.items()))
    return [_one_line(line) for line in lines]


def describe_task(record: TaskRecord) -> str:
    """One line on a learned task: name, trigger words, and the facts that were recorded."""
    facts = ", ".join(
        f"{name} {value[:12] if isinstance(value, str) and len(value) == 64 else value}"
        for name, value in record.facts.items()
        if isinstance(value, str | int | float)
    )  # hashes by their first digits
    text = f"{record.index:02d} {record.name}: {record.kind} '{record.concept}'"
    return _one_line(text + (f" ({facts})" if facts else ""))


def _trace_tasks_of(path: Path, lineage: Lineage, checks: list[Check]) -> list[Node]:
    """The tasks in a deliverable's header, with their folders where the run lies beside it."""
    run = path.with_suffix("")
    folders = {f.index: f for f in list_folders(run)} if run.is_dir() else {}
    if lineage.carry_hash and folders:
        newest = folders[max(folders)]
        same = newest.lineage.get("hashes", {}).get("carry") == lineage.carry_hash
        checks.append(Check("carry", "verified" if same else "differs", lineage.carry_hash))
    return [
        _trace_task(folders[task.index])
        if task.index in folders and folders[task.index].name == task.name
        else Node(describe_task(task))
        for task in lineage.tasks
    ]


def _trace_task(folder: TaskFolder) -> Node:
    checks = []
    for part, recorded in dict(folder.lineage.get("hashes", {})).items():
        file = folder.path / f"{part}.safetensors"
        state = "not kept"  # earlier carries are removed unless keep_carries = all
        if part == "adapter":
            state = "not found"
        if file.is_file():
            try:
                state = "verified" if file_model_hash(file) == recorded else "differs"
            except FileFormatError:
                state = "differs"
        checks.append(Check(part, state, str(recorded)))
    record = TaskRecord.from_json(folder.lineage["task"])
    return Node(describe_task(record), (str(folder.path),), tuple(checks))


def _check_base(recorded: str, search: Search) -> list[Check]:
    if not recorded:
        return []
    if not search.base_hash:
        return [Check("base", "not checked (name it to compare)", recorded)]
    state = "verified" if search.base_hash == recorded else "differs"
    return [Check("base", state, recorded)]


def _trace_parent(name: str, wanted: str, path: Path, search: Search) -> Node:
    title = f"parent: {_one_line(name)}"
    if wanted in search.seen:
        return Node(f"{title} (already shown)")
    found = find_by_hash(wanted, (path.parent, *search.folders))
    if found is None:
        return Node(title, checks=(Check("parent", "not found", wanted),))
    folder = read_folder(found.parent) if found.name == "carry.safetensors" else None
    below = _trace_task(folder) if folder else _trace_file(found, search)
    check = Check("parent", "verified", wanted)
    return Node(title, checks=(check,), children=(below,))


def find_by_hash(wanted: str, folders: Iterable[Path]) -> Path | None:
    """The file whose tensors have the hash `wanted`, by what its header claims first."""
    files = [
        f for folder in folders if folder.is_dir() for f in sorted(folder.rglob("*.safetensors"))
    ]
    files = list(dict.fromkeys(files))[:MAX_SEARCHED]
    claims = {file: _claimed_hash(file) for file in files}
    likely = [file for file, claim in claims.items() if claim == wanted]
    unclaimed = [file for file, claim in claims.items() if claim is None]
    for file in (*likely, *unclaimed):
        try:
            if file_model_hash(file) == wanted:
                return file
        except FileFormatError:
            continue
    return None


def _claimed_hash(file: Path) -> str | None:
    try:
        if (file.parent / LINEAGE).is_file():
            hashes = dict(read_json(file.parent / LINEAGE).get("hashes", {}))
            return str(hashes.get(file.stem, ""))
        return read_header(file).metadata.get("sshs_model_hash")
    except (LcpError, AttributeError, TypeError, ValueError):
        return ""


# ------------------------------------------------------------------------- a complete header


def header_of_run(folders: Sequence[TaskFolder], title: str) -> dict[str, str]:
    """All of a deliverable's header that its run's task folders record: kohya's `ss_*`,
    `modelspec.*` with trigger words, and parents, seeds, versions and options of the lineage.

    store.deliverable_header adds what describes the carry itself.

    Args:
        folders: the run's complete tasks in order; at least one.
    """
    last, records = folders[-1].lineage, folders[-1].records
    options = {**asdict(Options()), **last.get("options", {})}
    versions = dict(last.get("versions", {}))
    lineage = Lineage(
        parents=_parent_source(folders[0].lineage.get("parent", {})),
        seeds={"seed": last.get("seed"), "order_seed": options.get("order_seed")},
        versions=versions,
        options=last.get("options", {}),
    )
    spec = modelspec_header(
        options.get("metadata_title") or title,
        resolution=_resolution(options.get("resolution")),
        prediction_type="v" if options.get("v_parameterization") else "epsilon",
        triggers=tuple(dict.fromkeys(r.concept for r in records)),
        version=versions.get("lcp_plugin", ""),
        extra={
            name.removeprefix("metadata_"): str(value)
            for name, value in options.items()
            if name.startswith("metadata_") and name != "metadata_title" and value
        },
    )
    facts = {**_facts_of_run(folders), "output_name": title}
    return {**kohya_header(options, facts), **spec, **lineage.to_metadata()}


def _facts_of_run(folders: Sequence[TaskFolder]) -> dict[str, Any]:
    """What kohya's header says that no option does."""
    last = folders[-1].lineage
    base, training = last.get("base", {}), last.get("training", {})
    sessions = [folder.lineage.get("session", {}) for folder in folders]
    images = [int(folder.lineage.get("data", {}).get("images", 0)) for folder in folders]
    facts = {
        "session_id": sessions[-1].get("id"),
        "training_started_at": sessions[0].get("started_at"),
        "training_finished_at": sessions[-1].get("finished_at"),
        "num_train_images": sum(images),
        "steps": sum(int(f.lineage.get("training", {}).get("steps", 0)) for f in folders),
        "seed": last.get("seed"),
        "sd_model_name": base.get("name"),
        "new_sd_model_hash": base.get("hash"),
        "tag_frequency": tag_frequency(folders[-1].records),
        "dataset_dirs": {
            folder.path.name: {"n_repeats": 1, "img_count": count}
            for folder, count in zip(folders, images, strict=True)
        },
    }
    used = training.get("optimizer")  # the one really used; the option may have been replaced
    return {**facts, "optimizer": used} if used else facts


def _parent_source(parent: Mapping[str, Any]) -> tuple[Source, ...]:
    """What the run's first task was chained on; the name only, not the path to it."""
    if not parent.get("hash"):
        return ()
    return (Source(Path(str(parent.get("source") or "parent")).name, str(parent["hash"])),)


def _resolution(value: Any) -> str:
    """WxH of kohya's resolution option, which may be one number or two."""
    sides = re.findall(r"\d+", str(value or 1024))
    return f"{sides[0]}x{sides[-1]}" if sides else "1024x1024"


# ------------------------------------------------------------------------------ training again

_NOT_AGAIN = ("prev", "output_dir", "overwrite", "config", "config_file", "dry_run")


def retraining_config(path: str | Path) -> str:
    """TOML that would train a file again, as far as its header tells.

    Image folders are not in a header: each task has a line to fill in.

    Raises:
        FileFormatError: as `read_header`.  LineageError: the header says nothing of training.
    """
    path = Path(path)
    metadata = read_header(path).metadata
    summary, lineage = summarise(metadata), Lineage.from_metadata(metadata)
    options = {n: v for n, v in summary.options.items() if n not in _NOT_AGAIN and v is not None}
    if not options and not summary.triggers:
        raise LineageError(f"the header of {path} says nothing about how it was trained.")
    if lineage is not None and lineage.base:
        options["pretrained_model_name_or_path"] = lineage.base
    options.setdefault("output_name", f"{path.stem}_again")
    if lineage is not None and lineage.strategy and ":" not in lineage.strategy:
        options["strategy"] = lineage.strategy
        options["strategy_args"] = list(lineage.strategy_args)
    seeds = lineage.seeds if lineage is not None else {}
    options.update({name: value for name, value in seeds.items() if value is not None})
    tasks = lineage.tasks if lineage is not None else _tasks_of(summary, path)
    lines = [f"# trains {path.name} again, as far as its header tells"]
    for parent in lineage.parents if lineage is not None else ():
        lines.append(
            f"# it was made from {_one_line(parent.name)} ({parent.hash[:12]}): see --prev"
        )
    lines += [f"{name} = {toml_value(value)}" for name, value in sorted(options.items())]
    for task in tasks:
        lines += ["", "[[tasks]]", *_task_lines(task)]
    return "\n".join(lines) + "\n"


def _tasks_of(summary: Summary, path: Path) -> tuple[TaskRecord, ...]:
    """The tasks of a foreign file: its folders, or else its trigger words, or else its name."""
    words = [re.sub(r"^\d+_", "", Path(name).name) for name in summary.datasets]
    words = words or list(summary.triggers[:1]) or [path.stem]
    return tuple(
        TaskRecord(i, word, "object", word, facts={"trained on": str(list(summary.datasets))})
        for i, word in enumerate(words, 1)
    )


def _task_lines(task: TaskRecord) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", task.name).strip("._-") or f"task{task.index}"
    values: dict[str, Any] = {"name": name, "kind": task.kind, "concept": task.concept}
    if task.train_prompt:
        values["train_prompt"] = task.train_prompt
    if task.prompts:
        values["eval_prompts"] = list(task.prompts)
    known = ", ".join(f"{k} {v}" for k, v in task.facts.items() if isinstance(v, str | int))
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return [*lines, _one_line(f'image_dir = ""  # fill in; recorded: {known or "nothing"}')]


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


def failed(checks: Sequence[Check]) -> list[Check]:
    """The checks whose hash differs."""
    return [check for check in checks if check.state == "differs"]
