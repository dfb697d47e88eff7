"""README is short, and its commands and its config are those that work."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_read_in_three_screens() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_its_first_two_commands_install_train_and_test() -> None:
    train, test = (block.strip() for block in blocks("bash")[:2])
    config = "configs/quickstart.toml"
    assert (
        train == f"pip install -e . && accelerate launch train_continual_sdxl.py --config {config}"
    )
    assert test == 'pip install -e ".[test]" && python -m pytest -n 2 --dist loadfile'


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
