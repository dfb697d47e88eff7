"""Errors name the page that explains them, and each of these pages is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_runs import draw_pictures

from lcp_plugin.commands.front import main
from lcp_plugin.errors import ConfigError, LcpError, Page, StrategyError, explaining

ROOT = Path(__file__).parents[2]

WriteConfig = Callable[..., Path]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", Page, ids=lambda page: page.name)
def test_every_page_that_errors_name_is_there_with_its_heading(page: Page) -> None:
    name, _, anchor = page.partition("#")
    assert (ROOT / name).is_file()
    assert not anchor or anchor in headings(ROOT / name)


def test_every_page_is_named_by_an_error() -> None:
    sources = [p.read_text("utf-8") for p in (ROOT / "lcp_plugin").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"\bPage\.([A-Z_]+)", text)}
    assert named == {page.name for page in Page}


def test_the_page_stands_on_a_line_of_its_own_behind_all_problems() -> None:
    with pytest.raises(ConfigError) as caught, explaining(Page.OPTIONS):
        raise ConfigError("one", "two")
    assert caught.value.told == "error: one\nerror: two\nsee configs/OPTIONS.md"
    assert LcpError("alone").told == "error: alone"


def test_the_innermost_page_holds() -> None:
    with pytest.raises(StrategyError) as caught, explaining(Page.OPTIONS), explaining(Page.RECALL):
        raise StrategyError("recall")
    assert caught.value.page is Page.RECALL
    with pytest.raises(StrategyError) as caught, explaining(Page.OPTIONS, ConfigError):
        raise StrategyError("another kind")
    assert caught.value.page is StrategyError.page


@pytest.mark.parametrize(
    ("flags", "page"),
    [
        (["--learning_rtae", "1"], Page.OPTIONS),
        (["--strategy", "no_such_strategy"], StrategyError.page),
        (["--strategy", "recall", "--strategy_args", "imags=3"], Page.RECALL),
        (["--pretrained_model_name_or_path", "gone.safetensors"], Page.BASE),
    ],
)
def test_the_command_prints_the_page(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], flags: list[str], page: Page
) -> None:
    assert main(["train", "--config", str(write_config("run")), "--dry_run", *flags]) != 0
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("see ")] == [f"see {page}"]
    assert told[-1].startswith("see ")
    assert told[0].startswith("error: ")


def test_a_photo_that_cannot_be_read_names_the_page_on_photos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (draw_pictures(tmp_path / "photos" / "dog") / "bad.png").write_bytes(b"?")
    assert main(["init", str(tmp_path / "photos"), "--output", str(tmp_path / "x.toml")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("see ")
