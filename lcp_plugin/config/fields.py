"""How an option is declared: a dataclass field whose metadata says all that docs and checks need.

`grade` is what kohya's users expect of it (reference: kohya-ss/sd-scripts at 48d368fa): M must,
S should, R rare, A accepted without effect on an SDXL LoRA, X broken there; "ours" is new here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

Grade = Literal["M", "S", "R", "A", "X", "ours"]


def option(
    group: str,
    default: Any,
    help: str,
    *,
    grade: Grade = "M",
    choices: tuple[Any, ...] = (),
    no_effect: str = "",
    differs: str = "",
    per_task: bool = False,
    fixed: bool = True,
    minimum: float | None = None,
    maximum: float | None = None,
    key_values: bool = False,
    keep: bool = False,
    zero_unset: bool = False,
    multiple_of: int = 1,
) -> Any:
    """A dataclass field that declares an option.

    `no_effect`: why it is accepted but changes nothing here. `differs`: how it differs from kohya.
    `per_task`: may stand in [[tasks]]. `fixed`: must not change when a run is resumed.
    `minimum`, `maximum`: inclusive limits. `key_values`: a list of key=value, also given as a
    table. `keep`: an empty string is a value, not "unset". `zero_unset`: 0 means "unset".
    `multiple_of`: what whole numbers must be multiples of.
    """
    metadata = {
        "group": group,
        "help": help,
        "grade": grade,
        "choices": choices,
        "no_effect": no_effect,
        "differs": differs,
        "per_task": per_task,
        "fixed": fixed and not no_effect,
        "minimum": minimum,
        "maximum": maximum,
        "key_values": key_values,
        "keep": keep,
        "zero_unset": zero_unset,
        "multiple_of": multiple_of,
    }
    return field(default=default, metadata=metadata)


def group(name: str, **defaults: Any) -> Callable[..., Any]:
    """`option` with its group and some defaults filled in."""

    def declare(default: Any, help: str, **given: Any) -> Any:
        return option(name, default, help, **{**defaults, **given})

    return declare
