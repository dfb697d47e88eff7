"""A chain on another tool's LoRA: what it knows is rehearsed by prompts, given or in its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lcp_plugin.cli import main
from lcp_plugin.formats.header_prompts import prompts_of_metadata
from lcp_plugin.observers.jsonl import read_steps

SHORT = ("images=1", "sample_steps=2")


@pytest.mark.parametrize(
    ("metadata", "prompts"),
    [
        ({"modelspec.trigger_phrase": "sks dog"}, ("sks dog",)),
        ({"ss_dataset_dirs": json.dumps({"5_sks dog": {"n_repeats": 5}})}, ("a photo of sks dog",)),
        (
            {"ss_tag_frequency": json.dumps({"img": {"tree": 3, "ink wash": 9, "boat": 4}})},
            ("ink wash, boat, tree",),
        ),
        ({"ss_tag_frequency": "not JSON"}, ()),
        ({}, ()),
    ],
)
def test_a_header_says_what_a_lora_was_trained_on(
    metadata: dict[str, str], prompts: tuple[str, ...]
) -> None:
    assert prompts_of_metadata(metadata) == prompts


@pytest.fixture
def foreign(train: Callable[..., Any], tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """foreign(metadata) -> a LoRA with our tensors and nothing of our header."""
    from safetensors.torch import load_file

    run = train("source", tasks=(0,))
    tensors = load_file(run.store.deliverable)

    def write(metadata: dict[str, str]) -> Path:
        path = tmp_path / "anyones.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
        return path

    return write


def test_prompts_that_are_given_are_what_is_rehearsed(
    train: Callable[..., Any], foreign: Callable[[dict[str, str]], Path]
) -> None:
    run = train(
        "given",
        tasks=(1,),
        strategy="recall",
        strategy_args=SHORT,
        prev=str(foreign({})),
        prev_prompts=["a photo of sks disc"],
    )
    steps = read_steps(run.store.root / "logs" / "steps.jsonl")
    assert all("rehearsal" in step for step in steps)
    assert run.store.folders()[-1].records[0].facts["captions"] == ["a photo of sks disc"]


def test_a_trigger_phrase_in_the_header_is_rehearsed_and_said(
    train: Callable[..., Any],
    foreign: Callable[[dict[str, str]], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = foreign({"modelspec.trigger_phrase": "sks disc"})
    run = train("told", tasks=(1,), strategy="recall", strategy_args=SHORT, prev=str(path))
    assert run.store.folders()[-1].records[0].facts["captions"] == ["sks disc"]
    assert "is rehearsed by what its header says: 'sks disc'" in caplog.text


def test_nothing_to_go_by_is_one_line_with_the_way_out(
    write_config: Callable[..., Path],
    foreign: Callable[[dict[str, str]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config("lost", (1,), strategy="recall", prev=str(foreign({})))
    assert main(["--config", str(config)]) != 0
    assert "--prev_prompts" in capsys.readouterr().err


def test_prompts_of_a_parent_that_is_not_named_are_refused(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("new", (1,), prev_prompts=["a disc"])
    assert main(["--config", str(config), "--dry_run"]) == 2
    assert "prev is not given" in capsys.readouterr().err


def test_prompts_for_a_chain_of_ours_are_refused(
    train: Callable[..., Any],
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train("ours", tasks=(0,))
    config = write_config(
        "more", (1,), strategy="recall", prev=str(run.store.deliverable), prev_prompts=["a disc"]
    )
    flags = ["--config", str(config), "--allow_strategy_change"]
    assert main(flags) != 0
    assert "our own chains record" in capsys.readouterr().err
