"""README's code runs as it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_strategy_runs(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("python")
    (tmp_path / "mine_from_readme.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"strategy": "mine_from_readme:HalfMerge", "strategy_args": ["keep=0.5"]}
    run = train("run", tasks=(0, 1), **options)
    first = run.store.folders()[0].read_adapter()
    total = run.store.folders()[1].read_carry().total
    second = run.store.folders()[1].read_adapter()
    name = next(iter(first))
    expected = 0.5 * first[name].update() + second[name].update()
    assert abs(total[name].dense() - expected).max() < 1e-6


def test_the_example_config_is_a_valid_plan(tmp_path: Path) -> None:
    from toy_runs import draw_pictures

    from lcp_plugin.config.load import load_config

    (text,) = blocks("toml")
    for name in ("sneaker", "watercolor"):
        draw_pictures(tmp_path / "photos" / name)
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    config = load_config(["--config", str(path)])
    assert [t.options.max_train_steps for t in config.tasks] == [800, 1200]


def test_every_path_that_readme_names_exists() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    named = [w for line in commands for w in shlex.split(line.split("#")[0]) if "/" in w]
    paths = [w for w in named if w.startswith(("configs/", "tools/"))]
    paths += re.findall(r"\]\(([^)#]+)\)", TEXT)
    missing = [p for p in paths if not p.startswith("http") and not (ROOT / p).exists()]
    assert not missing
