"""`[[tasks]]`: what one task learns, from which images, with which options of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import UNSET, convert_option
from lcp_plugin.config.datasets import DatasetConfig, DatasetReader, SubsetConfig
from lcp_plugin.config.findings import Findings, did_you_mean
from lcp_plugin.config.folders import describe_left_out, list_images
from lcp_plugin.config.names import is_fit_as_folder
from lcp_plugin.config.options import Options, option_fields, option_types
from lcp_plugin.config.tables import read_table
from lcp_plugin.errors import ConfigError
from lcp_plugin.tasks import TRAIN_PROMPTS, Kind, default_prompts, fill_prompt

TASK_KEYS = (
    "name",
    "kind",
    "concept",
    "class_name",
    "image_dir",
    "train_prompt",
    "eval_prompts",
    "general",
    "datasets",
)
_TEXT_KEYS = ("name", "kind", "concept", "class_name", "train_prompt")


@dataclass(frozen=True)
class TaskConfig:
    """One task as configured; `options` are the run's with the task's own applied."""

    name: str
    kind: Kind
    concept: str
    train_prompt: str  # {class_name} may still stand in it
    eval_prompts: tuple[str, ...]
    datasets: tuple[DatasetConfig, ...]
    options: Options
    overrides: Mapping[str, Any] = field(default_factory=dict)
    has_tables: bool = False  # its data sets are described in tables, not by folders and options


@dataclass(frozen=True)
class TaskReader:
    """Reads task tables on top of the run's options."""

    options: Options
    explicit: frozenset[str]  # options given on the command line: they beat a task's own
    findings: Findings
    source: str
    folder: Path  # of the config file

    def roots(self) -> tuple[Path, ...]:
        """Where relative image folders are looked for: data_root, here, beside the config."""
        if self.options.data_root:
            return (Path(self.options.data_root),)
        return (Path("."), self.folder)

    def read(self, tables: Any) -> tuple[TaskConfig, ...]:
        """All tasks; problems for what does not fit."""
        if not isinstance(tables, list) or not tables:
            self.findings.problem(self.source, "no task: wanted at least one [[tasks]] table.")
            return ()
        tasks = [self._task(table, f"tasks[{i}]") for i, table in enumerate(tables)]
        read = tuple(task for task in tasks if task)
        self._check_names([task.name for task in read])
        return read

    def _check_names(self, names: Sequence[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name.lower() in seen:
                self.findings.problem(
                    self.source, f"two tasks are named {name!r}; each needs a name of its own."
                )
            seen.add(name.lower())

    def _task(self, table: Any, where: str) -> TaskConfig | None:
        if not isinstance(table, Mapping):
            self.findings.problem(self.source, f"{where}: wanted a table, got {table!r}.")
            return None
        name = str(table.get("name", "")).strip()
        where = f"tasks.{name}" if name else where
        texts = self._texts(table, where)
        overrides = self._overrides(table, where)
        kind: Kind = "style" if texts.get("kind") == "style" else "object"
        concept = texts.get("concept") or name
        template = texts.get("train_prompt") or TRAIN_PROMPTS[kind]
        options = replace(self.options, **overrides)
        train_prompt = template.replace("{concept}", concept)
        return TaskConfig(
            name=name,
            kind=kind,
            concept=concept,
            train_prompt=train_prompt,
            eval_prompts=self._eval_prompts(table, where, kind, concept),
            datasets=self._datasets(table, where, options, texts, train_prompt),
            options=options,
            overrides=overrides,
            has_tables="datasets" in table or "dataset_config" in table,
        )

    def _texts(self, table: Mapping[str, Any], where: str) -> dict[str, str]:
        for key in _TEXT_KEYS:
            if key in table and not isinstance(table[key], str):
                self.findings.problem(
                    self.source, f"{where}.{key} = {table[key]!r}: wanted text in quotes."
                )
        texts = {k: str(table[k]).strip() for k in _TEXT_KEYS if k in table}
        if not texts.get("name"):
            self.findings.problem(self.source, f"{where}: name is missing.")
        else:
            check_folder_name(texts["name"], f"{where}.name", self.source, self.findings)
        if texts.get("kind", "object") not in ("object", "style"):
            hint = did_you_mean(texts["kind"], ("object", "style"))
            self.findings.problem(
                self.source, f"{where}.kind = {texts['kind']!r}: wanted object or style.{hint}"
            )
        return texts

    def _overrides(self, table: Mapping[str, Any], where: str) -> dict[str, Any]:
        fields, types = option_fields(), option_types()
        allowed = [n for n, f in fields.items() if f.metadata["per_task"]]
        overrides: dict[str, Any] = {}
        for key, value in table.items():
            if key in TASK_KEYS:
                continue
            if key not in allowed:
                self._refuse(key, where, allowed)
                continue
            try:
                converted = convert_option(fields[key], types[key], value)
            except ValueError as error:
                self.findings.problem(self.source, f"{where}.{key} = {value!r}: {error}.")
                continue
            if key in self.explicit:
                self.findings.notice(f"--{key} on the command line beats the tasks' own {key}.")
            elif converted is not UNSET:
                overrides[key] = converted
        return overrides

    def _refuse(self, key: str, where: str, allowed: Sequence[str]) -> None:
        if key in option_fields():
            text = f"{where}.{key}: holds for the whole run; put it above the first [[tasks]]."
        else:
            hint = did_you_mean(key, [*TASK_KEYS, *allowed])
            text = f"{where}: unknown key {key!r}.{hint}"
        self.findings.problem(self.source, text)

    def _eval_prompts(
        self, table: Mapping[str, Any], where: str, kind: Kind, concept: str
    ) -> tuple[str, ...]:
        given = table.get("eval_prompts")
        if given is None:
            return default_prompts(kind, concept)
        prompts = [given] if isinstance(given, str) else given
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            self.findings.problem(
                self.source, f"{where}.eval_prompts = {given!r}: wanted a list of texts."
            )
            return ()
        return tuple(fill_prompt(p, concept) for p in prompts)

    def _datasets(
        self,
        table: Mapping[str, Any],
        where: str,
        options: Options,
        texts: Mapping[str, str],
        prompt: str,
    ) -> tuple[DatasetConfig, ...]:
        reader = DatasetReader(options, self.findings, self.source, self.roots())
        if "general" in table and "datasets" not in table:
            self.findings.problem(
                self.source, f"{where}.general: stands beside [[tasks.datasets]] only."
            )
        sources = [
            k
            for k in ("image_dir", "datasets", "dataset_config", "train_data_dir", "in_json")
            if k in table
        ]
        if len(sources) > 1 and not (set(sources) == {"train_data_dir", "in_json"}):
            self.findings.problem(
                self.source, f"{where}: {' and '.join(sources)} exclude each other; keep one."
            )
            return ()
        if "image_dir" in table:
            return self._from_image_dirs(table["image_dir"], where, reader, texts, prompt)
        if "datasets" in table:
            inner = {k: table[k] for k in ("general", "datasets") if k in table}
            return _with_caption(reader.from_table(inner, f"{self.source}: {where}"), texts, prompt)
        if "dataset_config" in table:
            return _with_caption(read_dataset_file(reader, self.folder), texts, prompt)
        if sources:
            return _with_caption(reader.from_folders(), texts, prompt)
        self.findings.problem(
            self.source,
            f"{where}: no images: wanted image_dir, dataset_config or [[tasks.datasets]].",
        )
        return ()

    def _from_image_dirs(
        self,
        given: Any,
        where: str,
        reader: DatasetReader,
        texts: Mapping[str, str],
        prompt: str,
    ) -> tuple[DatasetConfig, ...]:
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(n, str) and n for n in names):
            self.findings.problem(
                self.source, f"{where}.image_dir = {given!r}: wanted a folder in quotes."
            )
            return ()
        subsets: list[SubsetConfig] = []
        for name in names:
            folder = reader.locate(name)
            if reader.is_folder(folder, f"{where}.image_dir", name):
                subsets += self._image_dir(folder, where, reader, texts, prompt)
        if reader.options.reg_data_dir and subsets:
            subsets += reader.parent_folder(reader.options.reg_data_dir, "reg_data_dir", True)
        return (reader.dataset(subsets),) if subsets else ()

    def _image_dir(
        self,
        folder: Path,
        where: str,
        reader: DatasetReader,
        texts: Mapping[str, str],
        prompt: str,
    ) -> list[SubsetConfig]:
        """A folder of images; for a style also a folder of one folder per object."""
        if list_images(folder):
            return [reader.defaults(folder, class_tokens=_caption(prompt, texts, folder))]
        inner = sorted(p for p in folder.iterdir() if p.is_dir() and list_images(p))
        if inner and all(re.match(r"^\d+_", p.name) for p in inner):
            return reader.parent_folder(str(folder), f"{where}.image_dir", False)
        if inner and texts.get("kind") == "style":
            return [reader.defaults(p, class_tokens=_caption(prompt, texts, p)) for p in inner]
        hint = (
            f"; its folders do ({', '.join(p.name for p in inner[:3])}): name one" if inner else ""
        )
        told = f"holds no images{hint or '; put some there'}. {describe_left_out(folder)}".strip()
        self.findings.problem(self.source, f"{where}.image_dir '{folder}' {told}")
        return []


def read_dataset_file(reader: DatasetReader, folder: Path) -> tuple[DatasetConfig, ...]:
    """The data sets of options.dataset_config; a problem if it cannot be read."""
    name = str(reader.options.dataset_config)
    candidates = [Path(name).expanduser(), folder / name]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        reader.findings.problem(
            reader.source, f"dataset_config {name!r} is not a file; correct its path."
        )
        return ()
    try:
        table = read_table(path)
    except ConfigError as error:
        reader.findings.problems += error.problems
        return ()
    return replace(reader, roots=(*reader.roots, path.parent)).from_table(table, str(path))


def check_folder_name(name: str, key: str, source: str, findings: Findings) -> None:
    """A problem if a name is unfit as the name of a folder on any system."""
    if not is_fit_as_folder(name):
        findings.problem(
            source,
            f"{key} = {name!r} is unfit as a folder name; use letters, digits, _ and -.",
        )


def _caption(prompt: str, texts: Mapping[str, str], folder: Path) -> str:
    class_name = texts.get("class_name") or folder.name.replace("_", " ")
    return fill_prompt(prompt, texts.get("concept", ""), class_name)


def _with_caption(
    datasets: tuple[DatasetConfig, ...], texts: Mapping[str, str], prompt: str
) -> tuple[DatasetConfig, ...]:
    """Subsets without class tokens get the task's train prompt."""

    def captioned(subset: SubsetConfig) -> SubsetConfig:
        if subset.class_tokens or subset.is_reg or subset.metadata_file:
            return subset
        return replace(subset, class_tokens=_caption(prompt, texts, subset.image_dir))

    return tuple(replace(d, subsets=tuple(captioned(s) for s in d.subsets)) for d in datasets)
