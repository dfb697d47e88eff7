"""Defaults, preset, config file and flags become one checked `RunConfig`, before torch is imported.

Precedence: flag over config file over preset over default; values of dataset files beat them all.
All problems are listed at once. Unknown keys are errors in tasks, data sets and flags; at the top
of a config file they are errors only where they look like a misspelt option, or under
--strict_config, because files that other tools write hold keys of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.check import check_options, settle_options, settle_rates
from lcp_plugin.config.convert import UNSET, convert_option, is_zero
from lcp_plugin.config.datasets import DatasetReader
from lcp_plugin.config.findings import FOREIGN_KEYS, Findings, closest, did_you_mean
from lcp_plugin.config.flags import hide_secrets, parse_flags
from lcp_plugin.config.foreign import translate_foreign
from lcp_plugin.config.options import Options, option_fields, option_types
from lcp_plugin.config.path_lengths import check_path_lengths
from lcp_plugin.config.sources import OWN_TABLES, find_config, flatten
from lcp_plugin.config.tables import read_table
from lcp_plugin.config.task_table import (
    TaskConfig,
    TaskReader,
    check_folder_name,
    read_dataset_file,
)
from lcp_plugin.errors import ConfigError
from lcp_plugin.tasks import default_prompts

COMMAND_LINE = "command line"
_SURELY_MEANT = 0.86  # similarity above which an unknown key is a misspelt option


@dataclass(frozen=True)
class RunConfig:
    """A run as configured. `tasks` are in the file's order, before order_seed."""

    options: Options
    tasks: tuple[TaskConfig, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)  # option -> where it came from
    notices: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # of the command line, as given but for keys and tokens

    def fingerprint(self) -> dict[str, Any]:
        """What must not change when the run is resumed, JSON-able.

        Options by name, and "tasks": one table per task, in order (more may be appended).
        """
        tasks = [
            {
                "name": task.name,
                "kind": task.kind,
                "concept": task.concept,
                "train_prompt": task.train_prompt,
                "overrides": _fixed(task.overrides),
                "datasets": [_without_paths(asdict(d)) for d in task.datasets],
            }
            for task in self.tasks
        ]
        values = {n: getattr(self.options, n) for n in option_fields()}
        return {**_fixed(values), "tasks": tasks}


def load_config(argv: Sequence[str]) -> RunConfig:
    """The run that the flags and their config file describe. Raises ConfigError.

    With --list_strategies and --output_config nothing is checked and there are no tasks.
    """
    findings = Findings()
    flags = parse_flags(argv)
    name = _config_name(flags)
    writes = _is_true(flags.get("output_config"))  # then the config file is what is written
    path = find_config(name) if name and not writes else None
    table = read_table(path) if path else {}
    if not _is_true(flags.get("strict_config", flatten(table).get("strict_config"))):
        table = translate_foreign(table, str(path), flags, findings)
    layers = _layers(flags, table, path, findings)
    options, provenance = _merge(layers, findings)
    if (options.list_strategies or writes) and not findings.problems:
        return RunConfig(options, (), provenance)
    continual = "tasks" in table
    options, implied = settle_options(options, frozenset(provenance), continual, findings)
    provenance |= implied
    check_options(options, provenance, findings)
    source = str(path) if path else COMMAND_LINE
    explicit = frozenset(n for n, origin in provenance.items() if origin == COMMAND_LINE)
    if continual:
        _check_data_beside_tasks(options, table, source, findings)
    reader = TaskReader(options, explicit, findings, source, path.parent if path else Path("."))
    tasks = reader.read(table["tasks"]) if continual else _single_task(reader, table)
    tasks = tuple(_settled(task, findings) for task in tasks)
    check_path_lengths(options, [task.name for task in tasks], provenance, findings)
    if findings.problems:
        raise ConfigError(*dict.fromkeys(findings.problems))
    notices = tuple(findings.notices)
    return RunConfig(options, tasks, provenance, notices, hide_secrets(argv))


def _config_name(flags: Mapping[str, Any]) -> str | None:
    names = {flags[key] for key in ("config", "config_file") if flags.get(key)}
    if len(names) > 1:
        raise ConfigError(
            "command line: --config and --config_file name different files; give one."
        )
    return names.pop() if names else None


def _layers(
    flags: Mapping[str, Any], table: Mapping[str, Any], path: Path | None, findings: Findings
) -> list[tuple[str, dict[str, Any]]]:
    """(source, raw values) in rising precedence: preset, file, flags."""
    flat = {k: v for k, v in flatten(table).items() if k not in OWN_TABLES}
    flat.pop("general", None) if "datasets" in table else None
    layers = (
        [(str(path), flat), (COMMAND_LINE, dict(flags))] if path else [(COMMAND_LINE, dict(flags))]
    )
    preset = flags.get("preset", flat.get("preset"))
    if preset and preset in option_fields()["preset"].metadata["choices"]:
        values = flatten(read_table(find_config(f"preset_{preset}")))
        layers.insert(0, (f"preset {preset}", values))
    return layers


def _merge(
    layers: Sequence[tuple[str, Mapping[str, Any]]], findings: Findings
) -> tuple[Options, dict[str, str]]:
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    strict = any(_is_true(layer.get("strict_config")) for _, layer in layers)
    for source, layer in layers:
        _drop_arguments(layer, values, provenance, findings)
        for key, raw in layer.items():
            if key not in option_fields():
                _report_unknown(key, raw, source, strict, findings)
                continue
            try:
                value = convert_option(option_fields()[key], option_types()[key], raw)
            except ValueError as error:
                findings.problem(source, f"{key} = {raw!r}: {error}.")
                continue
            if value is not UNSET:
                values[key], provenance[key] = value, source
    steps = [layer.get("max_train_steps") for _, layer in layers]
    if any(map(is_zero, steps)) and not {"max_train_steps", "max_train_epochs"} & set(values):
        findings.problem("", "max_train_steps = 0: wanted at least 1, or max_train_epochs.")
    return Options(**values), provenance


def _drop_arguments(
    layer: Mapping[str, Any],
    values: dict[str, Any],
    provenance: dict[str, str],
    findings: Findings,
) -> None:
    """Arguments of one strategy are not those of another that a higher layer names instead."""
    name, before = layer.get("strategy"), values.get("strategy")
    if None in (name, before) or name == before or "strategy_args" in layer:
        return
    if values.pop("strategy_args", None):
        source = provenance.pop("strategy_args")
        findings.notice(f"{source}: strategy_args are left out; they are {before}'s, not {name}'s.")


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def _report_unknown(key: str, value: Any, source: str, strict: bool, findings: Findings) -> None:
    known = option_fields()
    foreign = key.lower() in FOREIGN_KEYS
    if strict or isinstance(value, list) and value and isinstance(value[0], dict):
        findings.problem(source, f"unknown key {key!r}.{did_you_mean(key, [*known, *OWN_TABLES])}")
    elif isinstance(value, Mapping):
        findings.problem(
            source,
            f"{key} is a table within a table; only one level is dissolved, so move its keys up.",
        )
    elif not foreign and value and _is_misspelt(key):
        findings.problem(source, f"unknown key {key!r}.{did_you_mean(key, known)}")
    else:
        hint = did_you_mean(key, known, 0.75)
        findings.notice(f"{source}: {key} is not known here and is ignored.{hint}")


def _check_data_beside_tasks(
    options: Options, table: Mapping[str, Any], source: str, findings: Findings
) -> None:
    """Data sets that stand outside the tasks have no place in a sequence."""
    if "datasets" in table:
        findings.problem(source, "datasets stand in a task, as [[tasks.datasets]], beside tasks.")
    for key in ("train_data_dir", "dataset_config", "in_json"):
        if getattr(options, key):
            findings.notice(f"{key} is not used: every task names its own images.")


def _is_misspelt(key: str) -> bool:
    """Whether a key is a known option with wrong letters, not one with words more or less."""
    nearest = closest(key, option_fields(), _SURELY_MEANT)
    return bool(nearest) and not (nearest.startswith(f"{key}_") or key.startswith(f"{nearest}_"))


def _single_task(reader: TaskReader, table: Mapping[str, Any]) -> tuple[TaskConfig, ...]:
    """A plain kohya run: one task, named after output_name."""
    options, findings = reader.options, reader.findings
    data = DatasetReader(options, findings, reader.source, reader.roots())
    if options.dataset_config:
        for key in ("train_data_dir", "reg_data_dir", "in_json"):
            if getattr(options, key):
                findings.notice(f"{key} is not used: dataset_config is given.")
        datasets = read_dataset_file(data, reader.folder)
    elif "datasets" in table:
        inner = {k: table[k] for k in ("general", "datasets") if k in table}
        datasets = data.from_table(inner, reader.source)
    elif options.train_data_dir or options.in_json:
        datasets = data.from_folders()
    else:
        findings.problem(
            "",
            "no task: give --config with [[tasks]], or images by train_data_dir or dataset_config.",
        )
        return ()
    subsets = [s for d in datasets for s in d.subsets if not s.is_reg]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", options.output_name or "last").strip("_") or "task"
    concept = next((s.class_tokens for s in subsets if s.class_tokens), name)
    return (
        TaskConfig(
            name=name,
            kind="object",
            concept=concept,
            train_prompt="",
            eval_prompts=default_prompts("object", concept),
            datasets=datasets,
            options=options,
            has_tables=bool(options.dataset_config) or "datasets" in table,
        ),
    )


def _settled(task: TaskConfig, findings: Findings) -> TaskConfig:
    """The task with its own options settled and checked as the run's are."""
    if not task.overrides:
        return task
    options = settle_rates(task.options, findings)
    check_options(options, {}, findings, where=f"tasks.{task.name}")
    return replace(task, options=options)


def _fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = option_fields()
    return {n: _jsonable(v) for n, v in values.items() if fields[n].metadata["fixed"]}


def _without_paths(dataset: Mapping[str, Any]) -> Any:
    """A data set's rules; what its folders hold is fingerprinted by their contents."""
    subsets = [
        {k: v for k, v in subset.items() if not isinstance(v, Path)}
        for subset in dataset["subsets"]
    ]
    rules = {k: v for k, v in dataset.items() if k != "skip_image_resolution" or v is not None}
    return _jsonable({**rules, "subsets": subsets})


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value


__all__ = ["RunConfig", "TaskConfig", "check_folder_name", "load_config"]
