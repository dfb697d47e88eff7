"""Configuration files: where they are found and how they are flattened; and the flags.

kohya's rules (sd-scripts, library/train_util.py at 48d368fa): ".toml" is appended if missing, every
top-level table is flattened one level, section names mean nothing, later duplicates win.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lcp_plugin.config.convert import type_name
from lcp_plugin.config.fields import Grade
from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.config.logs import SECRETS
from lcp_plugin.config.options import option_fields, option_types
from lcp_plugin.errors import ConfigError

OWN_TABLES = ("tasks", "datasets")  # not flattened: they hold tasks and data sets
OURS: Grade = "ours"


def config_folders() -> list[Path]:
    """Folders in which a bare config name is looked up: the checkout's, the installed package's."""
    package = Path(__file__).resolve().parents[1]
    shared = Path(sys.prefix) / "share" / "lcp_plugin" / "configs"
    return [Path("configs"), package.parent / "configs", package / "configs", shared]


def find_config(name: str) -> Path:
    """The file that `--config name` means. Raises ConfigError listing what there is."""
    name = str(Path(name).expanduser())
    names = [name] if name.endswith(".toml") else [f"{name}.toml", name]
    for candidate in names:
        if Path(candidate).is_file():
            return Path(candidate)
    ours = Path(name).parent in (Path("."), Path("configs"))
    for folder in config_folders() if ours else []:
        for candidate in names:
            if (folder / Path(candidate).name).is_file():
                return folder / Path(candidate).name
    known = sorted({f.stem for folder in config_folders() for f in folder.glob("*.toml")})
    hint = did_you_mean(Path(name).stem, known)
    raise ConfigError(
        f"config {name!r} is not a file, and not one of ours ({', '.join(known) or 'none'}).{hint}"
    )


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Top-level tables dissolved one level, but for tasks, data sets and tables of key=value."""
    fields = option_fields()
    flat: dict[str, Any] = {}
    for key, value in table.items():
        pairs = key in fields and fields[key].metadata["key_values"] and _are_pairs(value)
        general = key == "general" and "datasets" in table
        if isinstance(value, Mapping) and key not in OWN_TABLES and not pairs and not general:
            flat.update(value)
        else:
            flat[key] = value
    return flat


def _are_pairs(table: Any) -> bool:
    """Whether a table such as [optimizer_args] holds arguments, not options of a section."""
    if not isinstance(table, Mapping):
        return True
    return not any(k in option_fields() or isinstance(v, Mapping) for k, v in table.items())


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags as given, unconverted: option name -> text, list of texts or True.

    Abbreviations that are unique among kohya's options work, and `-` for `_`. Raises ConfigError.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args([_expand(word) for word in argv])
    problems = [_unknown_flag(word) for word in rest if word.startswith("--")]
    if rest and not problems:
        problems = [f"command line: {rest[0]!r} belongs to no option; options start with --."]
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
    return f"command line: unknown option --{name}.{did_you_mean(name, option_fields())}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}.")


def build_parser() -> argparse.ArgumentParser:
    """One flag per option; values stay text until all sources are merged."""
    parser = _Parser(
        prog="train_continual_sdxl.py",
        description="Learn a sequence of tasks with an SDXL LoRA. kohya's options work as they do "
        "in sd-scripts.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for name, field in option_fields().items():
        meta = field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        text = meta["help"] if not meta["no_effect"] else f"no effect here: {meta['no_effect']}"
        groups[meta["group"]].add_argument(
            f"--{name}", dest=name, help=text.replace("%", "%%"), **_arity(name)
        )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def _arity(name: str) -> dict[str, Any]:
    kind = type_name(option_types()[name])
    if kind == "true/false":
        return {"nargs": "?", "const": True, "metavar": "true|false"}
    if kind.startswith("list"):
        action = "extend" if name in ("observer", "export") else "store"
        return {"nargs": "*", "action": action, "metavar": kind[8:].upper().replace(" ", "_")}
    return {"metavar": kind.upper().replace(" ", "_")}
