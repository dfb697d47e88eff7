"""Where a LoRA file, a task folder or a run comes from: its chain as a tree, its hashes verified.

Headers are data: no path in them is followed. Parents are looked for by tensor hash, in the
folder of the file and in the folders that the caller names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcp_plugin.errors import FileFormatError, LcpError, LineageError
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.foreign_header import Claims, read_claims
from lcp_plugin.formats.header import MODEL_HASH
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_keys import parse_key
from lcp_plugin.formats.tensors import Header, read_header
from lcp_plugin.store.task_folder import LINEAGE, TaskFolder, list_folders, read_folder
from lcp_plugin.tasks import TaskRecord
from lcp_plugin.telling.wording import counted

MAX_SEARCHED = 500  # files looked at for a parent
_SSHS = re.compile("[0-9a-f]{64}")  # sha256 of all tensors' bytes, as kohya's sshs_model_hash


@dataclass(frozen=True)
class HashCheck:
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
    checks: tuple[HashCheck, ...] = ()
    children: tuple[Node, ...] = ()

    def all_checks(self) -> list[HashCheck]:
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
    return Node(
        f"{path}: run of {counted(len(tasks), 'task')}", children=tuple(map(_trace_task, tasks))
    )


def _trace_file(path: Path, search: Search) -> Node:
    header = read_header(path)
    claims = read_claims(header.metadata)
    actual = file_model_hash(path)
    checks = []
    claimed = header.metadata.get(MODEL_HASH)
    if claimed:
        checks.append(_check_tensors(claimed, actual))
    lines = [_describe_tensors(path, header), *_describe_claims(claims)]
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


def _check_tensors(claimed: str, actual: str) -> HashCheck:
    """Whether a file's tensors have the hash that its header claims. LyCORIS and some others hash
    tensor by tensor, in the order of saving, which a file does not keep: nothing to compare with.
    """
    if not _SSHS.fullmatch(claimed.lower()):
        return HashCheck("tensors", "not checked (another kind of hash)", one_line(claimed))
    return HashCheck("tensors", "verified" if claimed.lower() == actual else "differs", claimed)


def _describe_tensors(path: Path, header: Header) -> str:
    keys = [(parse_key(name), info) for name, info in header.tensors.items()]
    modules = {key.module for key, _ in keys if key}
    ranks = {info.shape[0] for key, info in keys if key and key.part == "down" and info.shape}
    rank = f", rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "") if ranks else ""
    size = path.stat().st_size / 1e6
    return f"{counted(len(modules), 'module')}{rank}, {size:.1f} MB"


def _describe_claims(claims: Claims) -> list[str]:
    named = {
        "made by": claims.tool,
        "title": claims.title,
        "date": claims.date,
        "base": claims.base,
        "trigger words": ", ".join(claims.triggers),
        "trained on": "; ".join(f"{n} ({c})" for n, c in claims.datasets.items()),
    }
    return [one_line(f"{name}: {value}") for name, value in named.items() if value]


def one_line(text: str) -> str:
    """Text of a header as one printable line of at most 300 characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 300 else text[:297] + "..."


def _describe_lineage(lineage: Lineage) -> list[str]:
    args = f" ({', '.join(lineage.strategy_args)})" if lineage.strategy_args else ""
    lines = [f"strategy: {lineage.strategy}{args}"] if lineage.strategy else []
    for name, table in (("seeds", lineage.seeds), ("versions", lineage.versions)):
        if table:
            lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in table.items()))
    return [one_line(line) for line in lines]


def describe_task(record: TaskRecord) -> str:
    """One line on a learned task: name, trigger words, and the facts that were recorded."""
    facts = ", ".join(
        f"{name} {value[:12] if isinstance(value, str) and len(value) == 64 else value}"
        for name, value in record.facts.items()
        if isinstance(value, str | int | float)
    )  # hashes by their first digits
    text = f"{record.index:02d} {record.name}: {record.kind} '{record.concept}'"
    return one_line(text + (f" ({facts})" if facts else ""))


def _trace_tasks_of(path: Path, lineage: Lineage, checks: list[HashCheck]) -> list[Node]:
    """The tasks in a deliverable's header, with their folders where the run lies beside it."""
    run = path.with_suffix("")
    folders = {f.index: f for f in list_folders(run)} if run.is_dir() else {}
    if lineage.carry_hash and folders:
        newest = folders[max(folders)]
        same = newest.lineage.get("hashes", {}).get("carry") == lineage.carry_hash
        checks.append(HashCheck("carry", "verified" if same else "differs", lineage.carry_hash))
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
        checks.append(HashCheck(part, state, str(recorded)))
    record = TaskRecord.from_json(folder.lineage["task"])
    return Node(describe_task(record), (str(folder.path),), tuple(checks))


def _check_base(recorded: str, search: Search) -> list[HashCheck]:
    if not recorded:
        return []
    if not search.base_hash:
        return [HashCheck("base", "not checked (name it to compare)", recorded)]
    state = "verified" if search.base_hash == recorded else "differs"
    return [HashCheck("base", state, recorded)]


def _trace_parent(name: str, wanted: str, path: Path, search: Search) -> Node:
    title = f"parent: {one_line(name)}"
    if wanted in search.seen:
        return Node(f"{title} (already shown)")
    found = find_by_hash(wanted, (path.parent, *search.folders))
    if found is None:
        return Node(title, checks=(HashCheck("parent", "not found", wanted),))
    folder = read_folder(found.parent) if found.name == "carry.safetensors" else None
    below = _trace_task(folder) if folder else _trace_file(found, search)
    check = HashCheck("parent", "verified", wanted)
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
        claim = read_header(file).metadata.get(MODEL_HASH, "").lower()
        return claim if _SSHS.fullmatch(claim) else None
    except (LcpError, AttributeError, TypeError, ValueError):
        return ""


def failed(checks: Sequence[HashCheck]) -> list[HashCheck]:
    """The checks whose hash differs."""
    return [check for check in checks if check.state == "differs"]
