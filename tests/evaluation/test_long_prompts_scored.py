"""Prompts beyond 75 tokens when images are scored: the run's own max_token_length decides."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quick_scores import made_in, score

from lcp_plugin.commands.front import main
from lcp_plugin.evaluation import command
from lcp_plugin.evaluation.inputs import collect_chains
from lcp_plugin.evaluation.rehearsal_set import Wishes, plan_set
from lcp_plugin.sdxl.long_prompts import TextRules

LONG = "a {concept} " + " ".join(["red"] * 80)


def write_protocol(path: Path, *prompts: str) -> str:
    path.write_text(f"[prompts]\nobject = {json.dumps(list(prompts))}\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def ends_matter(tmp_path: Path, pictures: Path, quick_encoder: None) -> Callable[..., bool]:
    """ends_matter(run, *flags): whether two prompts that differ at their ends give two images."""

    def compare(run: Path, *flags: str) -> bool:
        protocol = write_protocol(tmp_path / "p.toml", f"{LONG} blue", f"{LONG} green")
        asked = ("--protocol", protocol, "--images", "1", "--steps", "1")
        score([run], tmp_path / "scores", pictures, *asked, *flags)
        drawn = {p.name: p.read_bytes() for p in made_in(tmp_path / "scores" / "images")}
        pixels = {name: data[data.index(b"IDAT") :] for name, data in drawn.items()}
        return pixels["p00_00.png"] != pixels["p01_00.png"]

    return compare


def test_an_option_keeps_prompts_whole_that_are_cut_and_told_without_it(
    run: Path, ends_matter: Callable[..., bool], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not ends_matter(run)
    (told,) = [r.getMessage() for r in caplog.records if "cut there" in r.getMessage()]
    assert "4 of 4 evaluation prompts are longer than 75 tokens" in told
    assert "max_token_length = 150 keeps them whole" in told
    caplog.clear()
    assert ends_matter(run, "--max_token_length", "150")
    assert not [r for r in caplog.records if "cut there" in r.getMessage()]


def test_a_run_is_scored_with_the_max_token_length_that_it_was_trained_with(
    train: Callable[..., Any], ends_matter: Callable[..., bool], write_config: Callable[..., Path]
) -> None:
    run = train("long", tasks=(0,), max_train_steps=1, max_token_length=150)
    assert ends_matter(run.store.root)
    for source in (run.store.root, run.store.deliverable):
        base = str(run.options.pretrained_model_name_or_path)
        assert plan_set(source, Wishes(1, 0.5, (), base)).base.texts == TextRules(150)
    tasks = write_config("again", tasks=(0,), max_token_length=225)
    files = ["--adapters", str(run.store.deliverable), "--tasks", str(tasks), "--base", base]
    (chain,) = collect_chains(command.build_parser().parse_args(files))
    assert chain.base.texts == TextRules(225)


def test_a_length_that_no_trainer_has_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--max_token_length", "100"]) == 2
    assert "choose from 75, 150, 225" in capsys.readouterr().err
