"""Configuration files: where they are found and how they are flattened.

kohya's rules (sd-scripts, library/train_util.py at 48d368fa): ".toml" is appended if missing, every
top-level table is flattened one level, section names mean nothing, later duplicates win.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.config.options import option_fields
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.shipped import shipped_folders

OWN_TABLES = ("tasks", "datasets")  # not flattened: they hold tasks and data sets


def config_folders() -> list[Path]:
    """Folders in which a bare config name is looked up: the checkout's, the installed package's."""
    return [Path("configs"), *(folder / "configs" for folder in shipped_folders())]


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
        whole = pairs or general or key in OWN_TABLES or (key in fields and _are_pairs(value))
        if isinstance(value, Mapping) and not whole:
            flat.update(value)
        else:
            flat[key] = value
    return flat


def _are_pairs(table: Any) -> bool:
    """Whether a table such as [optimizer_args] holds arguments, not options of a section."""
    if not isinstance(table, Mapping):
        return True
    return not any(k in option_fields() or isinstance(v, Mapping) for k, v in table.items())
