"""Config texts, loaded as the command line loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from config_texts import fill_folder

from lcp_plugin.config.load import RunConfig, load_config

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a config text with flags, in a folder that holds dogs and a parent folder."""
    monkeypatch.chdir(tmp_path)
    fill_folder(tmp_path / "dogs")
    fill_folder(tmp_path / "train" / "10_sks dog")

    def build(text: str | bytes, *flags: str, name: str = "run.toml") -> RunConfig:
        data = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(data)
        return load_config(["--config", name, *flags])

    return build
