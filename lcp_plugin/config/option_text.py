"""What is told of an option: in the help, on the page of all options, and by `lcp options`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field
from textwrap import wrap
from typing import Any

from lcp_plugin.config.convert import type_name
from lcp_plugin.config.fields import Grade
from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.config.network_args import NETWORK_ARGS
from lcp_plugin.config.options import option_fields, option_types
from lcp_plugin.errors import ConfigError

OURS: Grade = "ours"
_COMMON = (OURS, "M")  # grades of the options that most runs use
_KEYS = "Keys of network_args"


def is_rare(field: Field[Any]) -> bool:
    """Whether few runs use an option, or none gains by it here."""
    return field.metadata["grade"] not in _COMMON or bool(field.metadata["no_effect"])


def describe(field: Field[Any]) -> str:
    """What an option does, and its choices; of one without effect, why it has none."""
    meta = field.metadata
    if meta["no_effect"]:
        return f"no effect here: {meta['no_effect']}"
    return str(meta["help"]) + choices_of(field)


def choices_of(field: Field[Any]) -> str:
    """' (a, b, c)' of an option that takes some words only, else ''."""
    choices = field.metadata["choices"]
    return f" ({', '.join(str(c) for c in choices)})" if choices else ""


def default_of(value: Any) -> str:
    """A default as a user would write it; '' where there is none."""
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------ `lcp options`


def list_options(words: Sequence[str], differing: bool = False, width: int = 100) -> str:
    """Options that hold every word in name, theme or text, by theme; all of them without words.

    Args:
        differing: only those that are new, or differ from kohya's.
    Raises:
        ConfigError: there is none; the message says which name is near.
    """
    lines: list[str] = []
    count = 0
    themes: dict[str, list[str]] = {}
    for name, field in option_fields().items():
        if _matches(words, (name, *_said_of(field))) and (_differs(field) or not differing):
            themes.setdefault(field.metadata["group"], []).extend(_entry(name, field, width))
            count += 1
    for key, text in NETWORK_ARGS.items():
        if not differing and _matches(words, (key, text, _KEYS)):
            themes.setdefault(_KEYS, []).extend([f"  {key}", *_indent(text, width)])
            count += 1
    if not count:
        hint = did_you_mean(words[0], [*option_fields(), *NETWORK_ARGS]) if words else ""
        raise ConfigError(f"no option has {' and '.join(words)!r} in its name or text.{hint}")
    for title, entries in themes.items():
        lines += [title, *entries, ""]
    total = len(option_fields()) + len(NETWORK_ARGS)
    lines.append(f"{count} of {total}; `new` is ours, `task` may stand in [[tasks]] too")
    return "\n".join(lines)


def _matches(words: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether each word stands in the texts; `-` is `_`, and case does not count."""
    text = " ".join(texts).lower()
    return all(w.lower() in text or w.lower().strip("-").replace("-", "_") in text for w in words)


def _said_of(field: Field[Any]) -> Iterator[str]:
    meta = field.metadata
    yield from (meta["group"], meta["help"], choices_of(field), meta["differs"], meta["no_effect"])


def _differs(field: Field[Any]) -> bool:
    meta = field.metadata
    return bool(meta["grade"] == OURS or meta["differs"] or meta["no_effect"])


def _entry(name: str, field: Field[Any], width: int) -> Iterator[str]:
    """The lines of an option: name, type and default; what it does; how it differs."""
    meta = field.metadata
    default = default_of(field.default)
    marks = [
        word
        for word, is_so in (("new", meta["grade"] == OURS), ("task", meta["per_task"]))
        if is_so
    ]
    facts = [type_name(option_types()[name]), *([f"default {default}"] if default else []), *marks]
    yield f"  {name}  ({', '.join(facts)})"
    yield from _indent(f"{meta['help']}{choices_of(field)}", width)
    if meta["no_effect"]:
        yield from _indent(f"no effect here: {meta['no_effect']}", width)
    elif meta["differs"]:
        yield from _indent(f"differs from kohya: {meta['differs']}", width)


def _indent(text: str, width: int) -> list[str]:
    return wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
