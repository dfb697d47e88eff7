"""Prompts for samples during training, from kohya's three kinds of file.

.txt: one prompt a line, `#` starts a comment; ` --n` negative prompt, `--w` width, `--h` height,
`--d` seed, `--l` guidance, `--s` steps, `--ss` sampler, in small or capital letters. .toml:
`[prompt]` with defaults and `[[prompt.subset]]`. .json: a list of texts (as in .txt) or of tables.
In a config the prompts themselves may stand, with at least one line break, as in a .txt file.
Facts from kohya-ss/sd-scripts (library/train_util.py at 48d368fa). Where we differ: width and
height default to the base's native size, a subset of a .toml may repeat a key of [prompt] (it
wins), a line that holds settings only belongs to the prompt above it, and values are checked.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import Unfit, convert
from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.tables import parse_json, parse_toml
from lcp_plugin.errors import ConfigError
from lcp_plugin.seeds import LARGEST_SEED

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


_SETTING = re.compile(r"(?:^|\s+)--(?=[A-Za-z])")
_NAME = re.compile(r"[A-Za-z]+(?=\s|$)")  # of a setting, its value behind a blank
_LIMITS: Mapping[str, tuple[float, float]] = {  # inclusive
    "width": (32, 8192),
    "height": (32, 8192),
    "sample_steps": (1, 1000),  # the noise schedule has no more
    "scale": (0, 1000),
    "seed": (0, LARGEST_SEED),
}


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


def read_prompts(source: str | Path) -> tuple[SamplePrompt, ...]:
    """The prompts of a .txt, .toml or .json file, or of a text of several lines.

    Raises ConfigError naming file and line.
    """
    if "\n" in str(source):
        return tuple(parse_line(line, at) for line, at in _lines(str(source), "sample_prompts"))
    path = Path(source)
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
        prompts = [parse_line(line, where) for line, where in _lines(text, path)]
    if not prompts:
        raise ConfigError(f"sample_prompts {path} holds no prompt; write one a line.")
    return tuple(prompts)


def _lines(text: str, path: Path | str) -> list[tuple[str, str]]:
    """(prompt with its settings, where it stands) of a .txt file."""
    found: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if found and _SETTING.match(line):
            above, where = found[-1]
            found[-1] = (f"{above} {line}", where)
        else:
            found.append((line, f"{path}:{number}"))
    return found


def parse_line(line: str, where: str) -> SamplePrompt:
    """A line of a .txt file: the prompt, then its settings. Raises ConfigError."""
    parts = _SETTING.split(line)
    table: dict[str, Any] = {"prompt": parts[0].strip()}
    for part in parts[1:]:
        name = _NAME.match(part)
        if name is None:
            raise ConfigError(
                f"{where}: setting --{part.split()[0]} is not understood; write a blank between "
                "name and value, as in --w 64."
            )
        flag = name[0].lower()
        if flag in _FOREIGN_FLAGS:
            continue
        if flag not in _FLAGS:
            known = ", ".join(f"--{f}" for f in _FLAGS)
            raise ConfigError(f"{where}: unknown setting --{flag} in a prompt; known: {known}.")
        table[_FLAGS[flag]] = part[name.end() :].strip()
    if not table["prompt"]:
        raise ConfigError(f"{where}: settings without a prompt; write the prompt before them.")
    return _prompt(table, where)


def _from_toml(path: Path, text: str) -> list[SamplePrompt]:
    shared = parse_toml(text, path).get("prompt")
    if not isinstance(shared, Mapping):
        raise ConfigError(f"{path}: wanted [prompt] and [[prompt.subset]].")
    common = {k: v for k, v in shared.items() if k != "subset"}
    subsets = shared.get("subset", [{}] if "prompt" in common else [])
    if not isinstance(subsets, list) or not all(isinstance(s, Mapping) for s in subsets):
        raise ConfigError(f"{path}: prompt.subset: wanted tables [[prompt.subset]].")
    return [
        _prompt({**common, **subset}, f"{path}: prompt.subset[{i}]")
        for i, subset in enumerate(subsets)
    ]


def _from_json(path: Path, text: str) -> list[SamplePrompt]:
    entries = parse_json(text, path)
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
            values[key] = _fit(key, convert(value, _TYPES[key]))
        except ValueError as error:
            raise ConfigError(f"{where}: {key} = {value!r}: {error}.") from None
    if "prompt" not in values:
        raise ConfigError(f"{where}: prompt is missing.")
    return SamplePrompt(**values)


def _fit(key: str, value: Any) -> Any:
    """The value within its limits; -1 as a seed means the run's own. Raises Unfit."""
    if key == "sample_sampler":
        return _sampler(str(value).strip())
    if key == "seed" and value == -1:
        return None
    low, high = _LIMITS.get(key, (0, 0))
    if key in _LIMITS and not low <= value <= high:
        raise Unfit(f"wanted {low:g} to {high:g}")
    return value


def _sampler(name: str) -> str | None:
    known = option_fields()["sample_sampler"].metadata["choices"]
    if not name:
        return None
    if name.lower() not in known:
        raise Unfit(f"wanted one of {', '.join(known)}")
    if name.lower().endswith("lms") and importlib.util.find_spec("scipy") is None:
        raise Unfit("it needs the package scipy; install it or use euler")
    return name.lower()
