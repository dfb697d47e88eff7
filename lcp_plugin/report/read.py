"""What a run's folder tells: run.json, */lineage.json, logs/*.jsonl, samples/ and scores.json.

Only JSON and file names are read here; whatever is missing (a run still going on, or stopped) is
empty in the report, never an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from lcp_plugin.errors import FileFormatError, RunFolderError
from lcp_plugin.evaluation.score_shape import check_scores
from lcp_plugin.formats import disk
from lcp_plugin.formats.pictures import list_images
from lcp_plugin.formats.shapes import Maybe, has_shape
from lcp_plugin.store.shapes import RECORD
from lcp_plugin.telling.wording import counted

log = logging.getLogger(__name__)
Facts = Mapping[str, Any]
NAMED = (str, dict, NoneType)  # a strategy or a base: its name, or a table with one
RUN = {  # what a page needs of run.json; older ones have less of it
    "tasks": Maybe([{**RECORD, "index": Maybe(int)}]),
    "images": Maybe({str: [str]}),
    "status": Maybe(str),
    "command": Maybe({"line": Maybe(str), "folder": Maybe(str)}),
    "steps": Maybe({str: (int, NoneType)}),
    "options": Maybe(dict),
    "config": Maybe(dict),
    "strategy": Maybe(NAMED),
    "base": Maybe(NAMED),
}
LINK = {  # and of a task's lineage.json
    "task": RECORD,
    "tasks": Maybe([RECORD]),
    "strategy": Maybe(NAMED),
    "base": Maybe(NAMED),
}


@dataclass(frozen=True)
class TaskFacts:
    """A task as its lineage tells it."""

    index: int
    name: str
    kind: str
    concept: str
    train_prompt: str
    images: tuple[Path, ...]
    facts: Facts
    folder: str

    @property
    def about(self) -> str:
        """`6 images · 850 steps · rank 64`, as far as it is known."""
        words: dict[str, Callable[[Any], str]] = {
            "images": lambda number: counted(number, "image"),
            "steps": lambda number: counted(number, "step"),
            "rank": "rank {:,}".format,
            "seconds": "{:,.0f} s".format,
        }
        known = [say(self.facts[k]) for k, say in words.items() if _is_number(self.facts.get(k))]
        if self.images and "images" not in self.facts:
            known.insert(0, f"{counted(len(self.images), 'image')}")
        return " · ".join([self.kind, *known])


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    folder: Path
    name: str
    strategy: str
    strategy_args: tuple[str, ...]
    base: str
    seed: Any
    order_seed: Any
    tasks: tuple[TaskFacts, ...]
    options: tuple[tuple[str, str], ...]
    lineage: tuple[Facts, ...]
    steps: tuple[Facts, ...]  # of logs/*.jsonl
    samples: Mapping[int, Mapping[str, tuple[Path, ...]]] = field(default_factory=dict)
    start: int = 0  # index of the last task that was known before; 0: it began on the base

    @property
    def label(self) -> str:
        """Strategy with what tells runs of it apart."""
        parts = [
            f"{k} {v}"
            for k, v in (("order", self.order_seed), ("seed", self.seed))
            if v is not None
        ]
        return " · ".join([self.strategy or self.name, *parts])


def read_run(folder: Path, is_watched: bool = False) -> RunFacts:
    """The facts of a run's folder.

    Args:
        is_watched: while it goes on: tasks that are only planned count too, and the steps are left
            to who follows the log.
    Raises:
        DataError: not a run's folder: neither run.json nor a task in it.
    """
    links = (read_table(p, LINK) for p in sorted(folder.glob("[0-9]*_*/lineage.json")))
    lineage = sorted(filter(None, links), key=lambda link: int(link["task"]["index"]))
    run = read_table(folder / "run.json", RUN)
    if not run and not lineage:
        raise RunFolderError(
            f"{folder} is not a run's folder: no run.json and no finished task in it."
        )
    last: Facts = lineage[-1] if lineage else {}
    options = run.get("options") or run.get("config") or {}
    strategy = _as_table(last.get("strategy") or run.get("strategy") or options.get("strategy"))
    base = _as_table(last.get("base") or run.get("base"))
    tasks = _read_tasks(run, lineage, is_watched)
    parent = read_table(folder / "parent" / "lineage.json", {"tasks": [RECORD]}).get("tasks", ())
    start = max((int(record["index"]) for record in parent), default=0)
    samples = _read_samples(folder / "samples", tasks)
    return RunFacts(
        folder=folder,
        name=str(run.get("name") or folder.name),
        strategy=str(strategy.get("name", "")),
        strategy_args=tuple(str(a) for a in strategy.get("args", ())),
        base=str(base.get("name") or options.get("pretrained_model_name_or_path") or ""),
        seed=_first(run, options, "seed"),
        order_seed=_first(run, options, "order_seed"),
        tasks=tasks,
        options=tuple((str(k), _text(v)) for k, v in sorted(options.items()) if v is not None),
        lineage=tuple(lineage),
        steps=() if is_watched else tuple(_read_steps(folder / "logs")),
        samples={stage or start: cells for stage, cells in samples.items()},
        start=start,
    )


def _read_tasks(run: Facts, lineage: Sequence[Facts], with_planned: bool) -> tuple[TaskFacts, ...]:
    """Finished tasks, oldest first; of a run without any, or asked for, the planned ones."""
    planned = {str(t.get("name")): t for t in run.get("tasks", ()) if isinstance(t, Mapping)}
    records: dict[int, Facts] = {}
    if with_planned:
        records = {int(t.get("index", i)): t for i, t in enumerate(planned.values(), 1)}
    for link in lineage:
        records |= {int(r["index"]): r for r in link.get("tasks", ())}
        records[int(link["task"]["index"])] = link["task"]
    found = [records[i] for i in sorted(records)] or list(planned.values())
    images: Facts = run.get("images") or {}
    return tuple(
        _read_task(i, record, images.get(str(record.get("name")), ()))
        for i, record in enumerate(found, 1)
    )


def _read_task(position: int, record: Facts, sources: Sequence[Any]) -> TaskFacts:
    index, name = int(record.get("index", position)), str(record.get("name", position))
    paths = tuple(image for source in sources for image in _list_images(Path(str(source))))
    return TaskFacts(
        index=index,
        name=name,
        kind=str(record.get("kind", "object")),
        concept=str(record.get("concept") or name),
        train_prompt=str(record.get("train_prompt", "")),
        images=paths,
        facts=dict(record.get("facts") or {}),
        folder=f"{index:02d}_{name}",
    )


def _list_images(source: Path) -> list[Path]:
    """A training folder's images (perhaps no longer there), or the image itself."""
    if source.is_file():
        return [source]
    return list_images(source) if source.is_dir() else []


def _read_samples(root: Path, tasks: Sequence[TaskFacts]) -> dict[int, dict[str, tuple[Path, ...]]]:
    """samples/<stage>/<task>_<number>.png: stage index (0: the base) -> task name -> images."""
    found: dict[int, dict[str, tuple[Path, ...]]] = {}
    for folder in sorted(p for p in root.glob("[0-9]*") if p.is_dir()):
        digits = folder.name.partition("_")[0]
        if not digits.isdigit():
            continue
        images = list_images(folder)
        cells = {t.name: tuple(p for p in images if _belongs(p, t)) for t in tasks}
        cells = {name: paths for name, paths in cells.items() if paths}
        if cells:
            found[int(digits)] = cells
    return found


def _belongs(path: Path, task: TaskFacts) -> bool:
    stem = path.stem.rpartition("_")[0]
    return stem in (task.name, task.folder)


def _read_steps(folder: Path) -> list[Facts]:
    """The step lines of all logs; of a repeated step the last line counts."""
    steps: dict[tuple[int, int], Facts] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text("utf-8", errors="replace").splitlines():
            try:
                fact = json.loads(line)
                if fact.get("event") == "step":
                    steps[int(fact["task_index"]), int(fact["step"])] = fact
            except (ValueError, AttributeError, KeyError, TypeError):
                continue  # a line cut off by a kill, or another program's
    return [steps[key] for key in sorted(steps)]


def find_scores(folder: Path) -> Path | None:
    """scores.json of a run: evaluation/ comes before the run's own folder."""
    places = (folder / "evaluation" / "scores.json", folder / "scores.json")
    return next((p for p in places if p.is_file()), None)


def read_scores(file: Path | None) -> Facts:
    """The parsed file; empty for None or a damaged one, of which a line tells."""
    try:
        return read_named_scores(file) if file is not None else {}
    except FileFormatError as error:
        log.warning("%s The page leaves the scores out.", error)
        return {}


def read_named_scores(file: Path) -> Facts:
    """The scores that a user has named. Raises FileFormatError: missing, damaged, or none."""
    return check_scores(disk.read_json(file), file)


def read_table(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table in a file; empty for one that is missing, damaged or of another shape."""
    try:
        value = disk.read_json(path)
    except FileFormatError:
        return {}
    return value if has_shape(value, dict if shape is None else shape) else {}


def _as_table(value: Any) -> Facts:
    return value if isinstance(value, Mapping) else {"name": value} if value else {}


def _first(run: Facts, options: Facts, key: str) -> Any:
    return run[key] if run.get(key) is not None else options.get(key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
