"""Whether optimizer_args fit an optimizer: argument names and kinds, read from its signature."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import counted

GIVEN = ("self", "params", "lr")  # given by the run, not among optimizer_args


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings, values read as Python literals (kohya's optimizer_args), else as text.

    Raises:
        ConfigError: an argument without "=".
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, raw = text.partition("=")
        if not equals:
            raise ConfigError(f"optimizer_args: '{text}' should read key=value.")
        try:
            values[key.strip()] = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            values[key.strip()] = raw
    return values


def check_arguments(
    make: Callable[..., Any], path: str, name: str, values: Mapping[str, Any]
) -> None:
    """Raises ConfigError for a name the optimizer does not take, or a value of the wrong kind.

    What a signature does not tell (a value out of range) is the optimizer's own to refuse.
    """
    try:
        known = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return
    is_open = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key, value in values.items():
        if key in GIVEN:
            raise misfit(path, name, f"'{key}' is the run's own; set learning_rate instead")
        if key in known:
            if wanted := _wanted_kind(known[key].default, value):
                raise misfit(path, name, f"{key}={value} should be {wanted}{_hint(value)}")
        elif not is_open:
            raise misfit(path, name, f"there is no argument '{key}'; {_describe(known, key)}")


def misfit(path: str, name: str, reason: object) -> ConfigError:
    """The one line about optimizer_args that an optimizer refuses."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return ConfigError(f"optimizer_args do not fit {path} (optimizer_type = '{name}'): {text}")


def _describe(known: Mapping[str, inspect.Parameter], key: str) -> str:
    names = [n for n, p in known.items() if n not in GIVEN and p.kind is not p.VAR_POSITIONAL]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}it takes {', '.join(names)}" if names else "it takes none"


def _wanted_kind(default: Any, value: Any) -> str:
    """What a value of the wrong kind should have been; "" where the kind is right or unknown."""
    if value is None or default is inspect.Parameter.empty:
        return ""
    if isinstance(default, tuple):
        fits = isinstance(value, tuple | list) and len(value) == len(default)
        return (
            "" if fits else f"{counted(len(default), 'value')} as in {','.join(map(str, default))}"
        )
    if not isinstance(value, str):
        return ""
    if isinstance(default, bool):
        return "True or False"
    return f"a number such as {default}" if isinstance(default, int | float) else ""


def _hint(value: Any) -> str:
    is_joined = isinstance(value, str) and "=" in value and " " in value
    return "; give each key=value as an argument of its own, unquoted" if is_joined else ""
