"""Errors name the page that explains them, and each of these pages is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_runs import draw_pictures

from lcp_plugin.commands.front import VERBS, Verb, main
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


def test_the_page_stands_behind_all_problems() -> None:
    with pytest.raises(ConfigError) as caught, explaining(Page.OPTIONS):
        raise ConfigError("one", "two")
    assert caught.value.told == "error: one\nerror: two. See configs/OPTIONS.md"
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
        (["--strategy", "no_such_strategy"], Page.STRATEGIES),
        (["--strategy", "test_errors:NoStrategy"], Page.HOOKS),
        (["--strategy", "recall", "--strategy_args", "imags=3"], Page.RECALL),
        (["--pretrained_model_name_or_path", "gone.safetensors"], Page.BASE),
    ],
)
def test_the_command_prints_the_page(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], flags: list[str], page: Page
) -> None:
    assert main(["train", "--config", str(write_config("run")), "--dry_run", *flags]) != 0
    told = capsys.readouterr().err.splitlines()
    assert told[-1].endswith(f" See {page}")
    assert all(line.startswith("error: ") for line in told)


@pytest.mark.parametrize(
    ("command", "page"),
    [
        (["report", "empty"], Page.RUNS),
        (["watch", "empty"], Page.RUNS),
        (["evaluate", "empty"], Page.RUNS),
        (["evaluate", "--generated", "empty", "--references", "empty"], Page.SCORES),
        (["init", "empty"], Page.PHOTOS),
        (["init", "photos", "--prev", "empty"], Page.RUNS),
        (["lineage", "empty"], Page.LINEAGE),
        (["rehearse", "empty", "--output", "out"], Page.RUNS),
        (["rehearse", "gone", "--output", "out"], Page.DRAWING),
        (["export", "broken.safetensors", "-o", "x.safetensors"], Page.LORAS),
        (["init", "photos", "--base", "broken.safetensors"], Page.BASE),
    ],
)
def test_every_command_names_the_page_on_what_it_was_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    page: Page,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 4)
    draw_pictures(tmp_path / "photos" / "dog", count=1)
    assert main(command) != 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(f" See {page}")


def test_a_chain_under_another_strategy_names_the_page_on_changing_it(
    train: Callable[..., Any], write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train("first", tasks=(0,), strategy="naive")
    config = write_config("next", tasks=(1,), prev=str(first.store.root))
    capsys.readouterr()
    assert main(["train", "--config", str(config), "--dry_run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f" See {Page.STRATEGY_CHANGE}")


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.page])
def test_a_verbs_own_mistakes_name_its_page(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb.name, "--no_such_option", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f" See {verb.page}")


def test_a_photo_that_cannot_be_read_names_the_page_on_photos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (draw_pictures(tmp_path / "photos" / "dog") / "bad.png").write_bytes(b"?")
    assert main(["init", str(tmp_path / "photos"), "--output", str(tmp_path / "x.toml")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f" See {Page.PHOTOS}")
