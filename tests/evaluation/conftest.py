"""One toy run, trained once for all that score it, and an encoder that is quick."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from quick_scores import Thumbnail
from toy_runs import draw_two, write_run

from lcp_plugin.evaluation import evaluate


@pytest.fixture(scope="session")
def trained_once(toy_base, tmp_path_factory):
    """Two tasks under merge_init: the first carry is not kept."""
    from lcp_plugin.config.load import load_config
    from lcp_plugin.run.runner import execute

    folder = tmp_path_factory.mktemp("once")
    config = write_run(folder, toy_base, draw_two(folder / "data"), "mine")
    return execute(load_config(["--config", str(config)])).store.root


@pytest.fixture
def run(trained_once, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained_once, tmp_path / "out" / "mine"))


@pytest.fixture
def quick_encoder(monkeypatch):
    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: Thumbnail())
