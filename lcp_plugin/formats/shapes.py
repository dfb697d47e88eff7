"""What JSON must look like before anyone looks into it: checked once, where a file is read.

A shape is a type, a tuple of types, `[shape]` for a list of such, `{str: shape}` for a table of
any names, or `{"name": shape, ...}` for a table of these at least, of which `Maybe(shape)` may be
missing. A whole number counts as a number, a truth value as neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from lcp_plugin.errors import FileFormatError

Shape: TypeAlias = Any  # recursive: see above
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
    NoneType: "nothing",
}


@dataclass(frozen=True)
class Maybe:
    """A value that may be missing."""

    shape: Shape


class Misshapen(Exception):
    """What is wrong, where, in words."""


def check_shape(value: Any, shape: Shape, path: Path, advice: str) -> Any:
    """The value, whose shape is right. Raises FileFormatError: one line that ends with `advice`."""
    try:
        _check(value, shape, "")
    except (Misshapen, RecursionError) as error:
        raise FileFormatError(f"{path} is not as it was written: {error}; {advice}") from None
    return value


def has_shape(value: Any, shape: Shape) -> bool:
    """Whether a value has a shape."""
    try:
        _check(value, shape, "")
    except (Misshapen, RecursionError):
        return False
    return True


def _check(value: Any, shape: Shape, where: str) -> None:
    if isinstance(shape, Maybe):
        _check(value, shape.shape, where)
    elif isinstance(shape, list):
        _check_kind(value, (list,), where)
        for number, one in enumerate(value):
            _check(one, shape[0], f"{where}[{number}]")
    elif isinstance(shape, Mapping):
        _check_kind(value, (dict,), where)
        _check_table(value, shape, where)
    else:
        _check_kind(value, shape if isinstance(shape, tuple) else (shape,), where)


def _check_table(value: Mapping[str, Any], shape: Mapping[Any, Shape], where: str) -> None:
    if str in shape:
        for name, one in value.items():
            _check(one, shape[str], _join(where, name))
        return
    for name, inner in shape.items():
        if name in value:
            _check(value[name], inner, _join(where, name))
        elif not isinstance(inner, Maybe):
            raise Misshapen(f"it has no {_join(where, name)}")


def _check_kind(value: Any, kinds: tuple[type, ...], where: str) -> None:
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if fits and (bool in kinds or not isinstance(value, bool)):
        return
    wanted = " or ".join(_WORDS[kind] for kind in kinds)
    raise Misshapen(f"{where or 'all of it'} is {_show(value)}, wanted {wanted}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{_WORDS[type(value)]} of {len(value)}"
    return "null" if value is None else repr(value)[:40]
