"""Prompts for samples during training, from kohya's three kinds of file.

.txt: one prompt a line, `#` starts a comment; ` --n` negative prompt, `--w` width, `--h` height,
`--d` seed, `--l` guidance, `--s` steps, `--ss` sampler. .toml: `[prompt]` with defaults and
`[[prompt.subset]]`. .json: a list of texts (as in .txt) or of tables. Facts from
kohya-ss/sd-scripts (library/train_util.py at 48d368fa). Where we differ: width and height default
to the base's native size, and a subset of a .toml may repeat a key of [prompt] (it wins).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import toml

from lcp_plugin.config.convert import convert
from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.errors import ConfigError

_FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "scale",
    "s": "sample_steps",
    "ss": "sample_sampler",
}
_FOREIGN_FLAGS = ("g", "cn", "ctr", "rcfg", "fs", "am", "of")  # of other models' samplers


@dataclass(frozen=True)
class SamplePrompt:
    """One sample to draw; None means the run's own setting."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    seed: int | None = None
    sample_sampler: str | None = None


_TYPES: Mapping[str, Any] = {
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "sample_steps": int,
    "scale": float,
    "seed": int,
    "sample_sampler": str,
}


def read_prompts(path: Path) -> tuple[SamplePrompt, ...]:
    """The prompts of a .txt, .toml or .json file. Raises ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sample_prompts {path} cannot be read ({error}).") from None
    kind = path.suffix.lower()
    if kind == ".toml":
        prompts = _from_toml(path, text)
    elif kind == ".json":
        prompts = _from_json(path, text)
    else:
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
        prompts = [parse_line(line, f"{path}:{i}") for i, line in lines if line and line[0] != "#"]
    if not prompts:
        raise ConfigError(f"sample_prompts {path} holds no prompt; write one a line.")
    return tuple(prompts)


def parse_line(line: str, where: str) -> SamplePrompt:
    """A line of a .txt file: the prompt, then its settings. Raises ConfigError."""
    parts = re.split(r"(?:^|\s+)--(?=[a-z]+(?:\s|$))", line)
    table: dict[str, Any] = {"prompt": parts[0].strip()}
    for part in parts[1:]:
        flag, _, value = part.partition(" ")
        if flag in _FOREIGN_FLAGS:
            continue
        if flag not in _FLAGS:
            known = ", ".join(f"--{f}" for f in _FLAGS)
            raise ConfigError(f"{where}: unknown setting --{flag} in a prompt; known: {known}.")
        table[_FLAGS[flag]] = value.strip()
    return _prompt(table, where)


def _from_toml(path: Path, text: str) -> list[SamplePrompt]:
    try:
        table = toml.loads(text)
    except (toml.TomlDecodeError, IndexError, TypeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from None
    shared = table.get("prompt")
    if not isinstance(shared, Mapping):
        raise ConfigError(f"{path}: wanted [prompt] and [[prompt.subset]].")
    common = {k: v for k, v in shared.items() if k != "subset"}
    subsets = shared.get("subset", [{}] if "prompt" in common else [])
    return [
        _prompt({**common, **subset}, f"{path}: prompt.subset[{i}]")
        for i, subset in enumerate(subsets)
    ]


def _from_json(path: Path, text: str) -> list[SamplePrompt]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}.") from None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: wanted a list of prompts.")
    prompts = []
    for i, entry in enumerate(entries):
        where = f"{path}: [{i}]"
        prompts.append(
            parse_line(entry, where) if isinstance(entry, str) else _prompt(entry, where)
        )
    return prompts


def _prompt(table: Any, where: str) -> SamplePrompt:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: wanted a text or a table, got {table!r}.")
    values: dict[str, Any] = {}
    known = [f.name for f in fields(SamplePrompt)]
    for key, value in table.items():
        if key not in _TYPES:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{where}: unknown key {key!r} in a prompt.{hint}")
        try:
            values[key] = convert(value, _TYPES[key])
        except ValueError as error:
            raise ConfigError(f"{where}: {key} = {value!r}: {error}.") from None
    if "prompt" not in values:
        raise ConfigError(f"{where}: prompt is missing.")
    return SamplePrompt(**values)
