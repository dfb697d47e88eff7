"""Values from TOML, JSON and the command line become typed ones, or a reason why they cannot.

Text is taken where the type is clear ("1e-4", "32", "true"), since GUIs write numbers as strings.
"""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, Union, get_args, get_origin

UNSET = object()  # an empty string where it means nothing: the default holds

_BYTES = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


class Unfit(ValueError):
    """A value that does not fit; the text says what was wanted."""


def convert_option(field: Field[Any], annotation: Any, value: Any) -> Any:
    """`value` as the option's type, within its choices and limits.

    Raises Unfit. Returns UNSET for an empty string, or a 0, that means "not given".
    """
    if isinstance(value, str) and value.strip() == "" and not field.metadata["keep"]:
        return "" if field.default == "" else UNSET
    if isinstance(value, (list, tuple)) and value and not any(str(v).strip() for v in value):
        return UNSET
    if field.metadata["zero_unset"] and is_zero(value):
        return UNSET
    if field.metadata["key_values"]:
        return key_values(value)
    result = convert(value, annotation)
    _check_choices(result, field.metadata["choices"])
    _check_limits(result, field.metadata["minimum"], field.metadata["maximum"])
    _check_multiple(result, field.metadata["multiple_of"])
    return result


def is_zero(value: Any) -> bool:
    """Whether a value is a GUI's 0 for "not given", as number or text."""
    return not isinstance(value, bool) and str(value).strip() in ("0", "0.0")


def convert(value: Any, annotation: Any) -> Any:
    """`value` as bool, int, float, str, a tuple of these, or (width, height). Raises Unfit."""
    annotation = _without_none(annotation)
    if get_origin(annotation) is tuple:
        kinds = get_args(annotation)
        if kinds == (int, int):
            return _size(value)
        return tuple(convert(v, kinds[0]) for v in _listed(value))
    functions = {bool: _boolean, int: _whole, float: _number, str: _text}
    return functions[annotation](value)


def key_values(value: Any) -> tuple[str, ...]:
    """A list of key=value; also from a table, or from one string with spaces between them."""
    if isinstance(value, Mapping):
        return tuple(f"{key}={_literal(v)}" for key, v in value.items())
    words = shlex.split(value) if isinstance(value, str) else [_text(v) for v in _listed(value)]
    words = [word for word in words if word.strip()]
    for word in words:
        if "=" not in word:
            raise Unfit(f"wanted key=value, got {word!r}")
    return tuple(words)


def parse_bytes(text: str) -> int:
    """ "2GB", "500 MB", "1.5GiB" or a plain number of bytes. Raises Unfit."""
    found = _BYTES.match(text.strip())
    if not found or float(found[1]) <= 0:
        raise Unfit("wanted a size such as 2GB or 500MB")
    prefix, binary = found[2].upper(), found[3]
    step = 1024 if binary else 1000
    return int(float(found[1]) * step ** ("KMGT".index(prefix) + 1 if prefix else 0))


def type_name(annotation: Any) -> str:
    """The type as a user reads it."""
    inner = _without_none(annotation)
    if get_origin(inner) is tuple:
        kinds = get_args(inner)
        return "width,height" if kinds == (int, int) else f"list of {type_name(kinds[0])}"
    return {bool: "true/false", int: "whole number", float: "number", str: "text"}[inner]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _literal(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_literal(v) for v in value)
    return str(value)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if isinstance(value, (bool, str, int)) and text in _TRUE | _FALSE:
        return text in _TRUE
    raise Unfit("wanted true or false")


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise Unfit("wanted a whole number")
    return int(value) if isinstance(value, int) else int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Unfit("wanted a number")
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise Unfit("wanted a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise Unfit("wanted a finite number")
    return number


def _text(value: Any) -> str:
    if isinstance(value, str) and "\0" in value:
        raise Unfit("wanted text without null characters")
    if isinstance(value, (str, int, float)):
        return str(value)
    raise Unfit("wanted text")


def _size(value: Any) -> tuple[int, int]:
    parts = value.split(",") if isinstance(value, str) else _listed(value)
    if len(parts) not in (1, 2):
        raise Unfit('wanted "width,height" or one number')
    numbers = [_whole(p) for p in parts]
    if min(numbers) < 8:
        raise Unfit("wanted at least 8 pixels a side")
    return numbers[0], numbers[-1]


def _check_choices(value: Any, choices: tuple[Any, ...]) -> None:
    if choices and value not in choices:
        raise Unfit(f"wanted one of {', '.join(str(c) for c in choices)}")


def _check_limits(value: Any, minimum: float | None, maximum: float | None) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if minimum is not None and number < minimum:
            raise Unfit(f"wanted at least {minimum:g}")
        if maximum is not None and number > maximum:
            raise Unfit(f"wanted at most {maximum:g}")


def _check_multiple(value: Any, unit: int) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if unit > 1 and number % unit:
            raise Unfit(f"wanted a multiple of {unit} (the next is {-(-number // unit) * unit})")
