"""--output_config: the options that were given, as a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toml

from lcp_plugin.config.load import RunConfig
from lcp_plugin.errors import ConfigError

_NOT_WRITTEN = ("config", "config_file", "output_config")


def write_given_options(config: RunConfig) -> Path:
    """Write the given options to the path of --config; an existing file is never overwritten.

    Raises ConfigError if no path was given or there is a file already.
    """
    name = config.options.config_file or config.options.config
    if not name:
        raise ConfigError("output_config: give the file to write with --config_file.")
    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if path.exists():
        raise ConfigError(f"output_config: {path} exists; remove it or give another name.")
    path.write_text(render_given_options(config), encoding="utf-8")
    return path


def render_given_options(config: RunConfig) -> str:
    """The given options as TOML, in the order of the documentation."""
    given: dict[str, Any] = {}
    for name in config.provenance:
        if name in _NOT_WRITTEN:
            continue
        value = getattr(config.options, name)
        if name == "resolution" and value is not None:
            value = f"{value[0]},{value[1]}"
        given[name] = list(value) if isinstance(value, tuple) else value
    return str(toml.dumps(given))
