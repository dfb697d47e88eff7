"""The flags of the training command: one for each option, and a help that is read by themes.

`--help` shows our own options first, then those of kohya's that most runs use; `--help-all` shows
every one. Which are rare is the grade of an option's declaration (`fields.Grade`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, NoReturn

from lcp_plugin.config.convert import type_name
from lcp_plugin.config.findings import closest
from lcp_plugin.config.logs import SECRETS
from lcp_plugin.config.option_text import OURS, default_of, describe, is_rare
from lcp_plugin.config.options import option_fields, option_types
from lcp_plugin.config.parser import Formatter
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import quote

EVERYTHING = "--help-all"
_USAGE = """lcp train --config FILE [--option value ...]
       accelerate launch -m lcp_plugin train --config FILE ...   on several GPUs"""
_METAVARS = {"text": "TEXT", "whole number": "N", "number": "X", "width,height": "WIDTH,HEIGHT"}
_ABOUT = """Learns a sequence of tasks with an SDXL LoRA; kohya's options work as in sd-scripts.
Each option is a key of the config file too, and a flag beats the file. A switch is on with
--name and off with --name false; [brackets] hold defaults."""


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags as given, unconverted: option name -> text, list of texts or True.

    Abbreviations that are unique among kohya's options work, and `-` for `_`. Raises ConfigError.
    """
    given, rest = build_parser().parse_known_args([_expand(word) for word in argv])
    problems = [_unknown_flag(word) for word in rest if word.startswith("--")]
    if rest and not problems:
        hint = f" Did you mean --config {quote(rest[0])}?" if rest[0].endswith(".toml") else ""
        problems = [f"command line: {rest[0]!r} belongs to no option; options start with --.{hint}"]
    if problems:
        raise ConfigError(*problems)
    return {k: v for k, v in vars(given).items() if k != "local_rank"}


def hide_secrets(argv: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line with `...` for every key and token, so that it can be shown."""
    shown: list[str] = []
    for word in argv:
        name, equals, _ = _expand(word)[2:].partition("=") if word.startswith("--") else ("",) * 3
        if name in SECRETS and equals:
            word = f"--{name}=..."
        elif shown and _names_secret(shown[-1]) and not word.startswith("--"):
            word = "..."
        shown.append(word)
    return tuple(shown)


def _names_secret(word: str) -> bool:
    return word.startswith("--") and _expand(word)[2:] in SECRETS


def _expand(word: str) -> str:
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    fields = option_fields()
    if name == EVERYTHING[2:].replace("-", "_"):
        return EVERYTHING
    if name in fields or name in ("help", "local_rank") or not name:
        return f"--{name}{equals}{value}"
    known = [n for n, f in fields.items() if f.metadata["grade"] != OURS]
    matches = [n for n in known if n.startswith(name)]
    matches = matches or [n for n in fields if n.startswith(name)]
    if len(matches) > 1:
        names = ", ".join(f"--{m}" for m in matches[:6])
        raise ConfigError(f"command line: --{name} could be {names}; write it in full.")
    return f"--{matches[0] if matches else name}{equals}{value}"


def _unknown_flag(word: str) -> str:
    name = word[2:].partition("=")[0]
    nearest = closest(name, option_fields())
    hint = f" Did you mean --{nearest}?" if nearest else ""
    return f"command line: unknown option --{name}.{hint}"


# -------------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}.")


class _HelpAll(argparse.Action):
    """Prints the help with the rare options in it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(build_parser(everything=True).format_help(), end="")
        parser.exit()


def build_parser(everything: bool = False) -> argparse.ArgumentParser:
    """One flag per option; values stay text until all sources are merged.

    Args:
        everything: whether its help shows the rare options too.
    """
    parser = _Parser(
        prog="lcp train",
        usage=_USAGE,
        description=_ABOUT,
        epilog=_closing_words(everything),
        formatter_class=Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    helps = parser.add_argument_group("help")
    helps.add_argument("-h", "--help", action="help", help="these options")
    helps.add_argument(EVERYTHING, action=_HelpAll, nargs=0, help="these and the rare ones")
    for title, fields in _themes().items():
        group = parser.add_argument_group(title)
        for name, field in fields.items():
            hidden = is_rare(field) and not everything
            text = argparse.SUPPRESS if hidden else _help_of(field)
            group.add_argument(f"--{name}", dest=name, help=text, **_arity(name))
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def _themes() -> Mapping[str, Mapping[str, Field[Any]]]:
    """Title -> options: what is ours first, then kohya's by theme."""
    ours: dict[str, dict[str, Field[Any]]] = {}
    theirs: dict[str, dict[str, Field[Any]]] = {}
    for name, field in option_fields().items():
        theme = field.metadata["group"]
        if field.metadata["grade"] != OURS:
            theirs.setdefault(f"kohya: {theme}", {})[name] = field
        else:
            own = "Tasks and strategy", "Samples"
            title = f"ours: {theme if theme in own else 'Data, network, configuration'}"
            ours.setdefault(title, {})[name] = field
    return {**ours, **theirs}


def _help_of(field: Field[Any]) -> str:
    default = default_of(field.default)
    shown = f" [{default}]" if default and default != "false" else ""
    return f"{describe(field)}{shown}".replace("%", "%%")


def _closing_words(everything: bool) -> str:
    rare = sum(map(is_rare, option_fields().values()))
    more = "" if everything else f"{rare} rarer options: {EVERYTHING}. "
    return f"{more}`lcp options WORD` finds one, with where it differs from kohya."


def _arity(name: str) -> dict[str, Any]:
    kind = type_name(option_types()[name])
    if kind == "true/false":
        return {"nargs": "?", "const": True, "metavar": "false"}
    if kind.startswith("list"):
        action = "extend" if name in ("observer", "export") else "store"
        return {"nargs": "*", "action": action, "metavar": _METAVARS[kind[8:]]}
    return {"metavar": _METAVARS[kind]}
