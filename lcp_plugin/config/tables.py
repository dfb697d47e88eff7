"""Files of keys and values: TOML and JSON, read as their writers meant them.

TOML 1.0 is read by tomllib. What is none, but what kohya's reader (the package toml) takes, is read
by toml, so that files which train there train here.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import toml

from lcp_plugin.config.peers import stop_at_peers, stop_at_yaml
from lcp_plugin.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"^[A-Za-z]:[^\n]*[\x00-\x1f]")
_PATH_KEY = re.compile(r"(_dir|_file|_path|_root)$")
_PATHS = (
    "pretrained_model_name_or_path",
    "vae",
    "prev",
    "in_json",
    "resume",
    "config",
    "dataset_config",
    "network_weights",
    "base_weights",
    "log_tracker_config",
)
_YAML_PAIR = re.compile(r"^\s*(- )?[\w\"' ]+:(\s|$)")


def read_table(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as a dictionary; a Windows BOM is skipped. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    is_json = path.suffix.lower() == ".json" and not _is_toml(text)
    table = parse_json(text, path) if is_json else parse_toml(text, path)
    stop_at_peers(table, path)
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: wanted a table of keys at the top.")
    _check_escapes(table, path)
    return table


def parse_json(text: str, name: str | Path) -> Any:
    """The value of a JSON text. Raises ConfigError naming the file."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: {_syntax_help(error, text)}") from None


def parse_toml(text: str, name: str | Path) -> dict[str, Any]:
    """The tables of a TOML text. Raises ConfigError naming the file."""
    try:
        return dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        first = error
    try:
        return dict(toml.loads(text))
    except Exception:  # whatever toml stumbles over, the standard's reader has said it better
        pass
    if text.lstrip().startswith("{"):
        table = parse_json(text, name)  # JSON under another name
        return dict(table)
    if _is_yaml(text):
        stop_at_yaml(text, name)
    raise ConfigError(f"{name}: {_syntax_help(first, text)}")


def _is_toml(text: str) -> bool:
    """Whether a text that is to be JSON has the lines of TOML, or of YAML."""
    return bool(re.match(r"\s*(#[^\n]*\s+)*(\[{1,2}[A-Za-z_][\w.]*\]{1,2}|[\w\"'-]+\s*[=:])", text))


def _is_yaml(text: str) -> bool:
    """Whether most lines read `key: value` or `- item`, and none `key = value`."""
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    if lines and lines[0].strip() == "---":
        return True
    pairs = [line for line in lines if _YAML_PAIR.match(line) or line.lstrip().startswith("- ")]
    return 2 * len(pairs) > len(lines) and not any(re.match(r"^\w+\s*=", line) for line in lines)


def _syntax_help(error: Exception, text: str) -> str:
    message = " ".join(str(error).split()).rstrip(".")
    if "escape" in message.lower() or ("\\" in text and "\\\\" not in text):
        message += f"; write Windows paths {_way_of_paths(text.lstrip()[:1] == '{')}"
    return f"is not valid: {message}."


def _way_of_paths(is_json: bool) -> str:
    """How a path with backslashes is written in TOML, or in JSON, which has no single quotes."""
    return "with / or with two backslashes" if is_json else "with / or in 'single quotes'"


def _check_escapes(table: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for paths whose backslashes were read as tabs or line ends."""
    way = _way_of_paths(path.suffix.lower() == ".json")
    problems = [
        f"{path}: {key} = {value!r}: a backslash in double quotes is no folder's (\\t is a tab, "
        f"\\n a new line); write the path {way}."
        for key, value in _texts(table)
        if _DRIVE.match(value)
        or (_CONTROL.search(value) and (key in _PATHS or _PATH_KEY.search(key)))
    ]
    if problems:
        raise ConfigError(*problems)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
