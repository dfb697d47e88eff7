"""No file is replaced or removed while this process has it open or mapped: Windows refuses that."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from held_files import CAN_TELL, as_on_windows
from lora_samples import load_tool
from quick_scores import Thumbnail, score
from toy_runs import draw_two, write_run

from lcp_plugin.cli import main
from lcp_plugin.evaluation import evaluate
from lcp_plugin.formats.tensors import read_tensors, write_tensors
from lcp_plugin.observers import JsonLines

pytestmark = pytest.mark.skipif(not CAN_TELL, reason="only /proc tells what a process holds")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Windows would have refused; a test ends with nothing in it."""
    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: Thumbnail())
    with as_on_windows(monkeypatch) as found:
        yield found
    assert not found


@pytest.fixture(scope="module")
def learned(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `mine` of two tasks, and the TOML of its command."""
    folder = tmp_path_factory.mktemp("held")
    data = draw_two(folder / "data")
    config = write_run(folder, toy_base, data, "mine", samples_per_task=1, sample_steps=1)
    later = {"name": "later", "kind": "object", "concept": "sks2 disc", "image_dir": "disc1"}
    write_run(folder, toy_base, data, "next", [later], strategy="magmax")
    with pytest.MonkeyPatch.context() as patch, as_on_windows(patch) as found:
        assert main(["--config", str(config)]) == 0
    assert not found
    return folder


@pytest.fixture
def place(learned: Path, tmp_path: Path) -> Path:
    """A copy of its output that a test may spoil."""
    return Path(shutil.copytree(learned / "out", tmp_path / "out"))


def command_of(learned: Path, place: Path, config: str, *more: str) -> list[str]:
    """The command of a TOML in `learned`, its output in `place`."""
    return ["--config", str(learned / config), "--output_dir", str(place), *more]


def test_what_is_mapped_or_open_is_refused_here_as_windows_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "a.safetensors"
    write_tensors(file, {"a": torch.ones(4000)})
    with as_on_windows(monkeypatch) as found:
        mapped = read_tensors(file)
        for attempt in (file.unlink, lambda: os.replace(file.parent, tmp_path / "other")):
            with pytest.raises(PermissionError, match="mapped"):
                attempt()
        del mapped
        with file.open("rb"), pytest.raises(PermissionError, match="open"):
            os.rename(file, tmp_path / "b")
        shutil.rmtree(file.parent)
    assert len(found) == 3
    assert not file.exists()


def test_a_run_that_stops_and_goes_on(
    learned: Path, place: Path, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves a state behind the step, reads it, and removes it when the task is complete."""
    real = JsonLines.on_step_end

    def stop(self: Any, run: Any, step: Any) -> None:
        real(self, run, step)
        if step.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    command = command_of(
        learned, place, "mine.toml", "--output_name", "stopped", "--strategy", "recall"
    )
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "on_step_end", stop)
        assert main(command) != 0
    assert list((place / "stopped" / "state").iterdir())
    assert main(command) == 0
    assert not (place / "stopped" / "state").exists()


@pytest.mark.parametrize("source", ["mine/02_disc1", "mine.safetensors"])
def test_a_chain_and_starting_it_over(
    learned: Path, place: Path, refused: list[str], source: str
) -> None:
    for more in ((), ("--max_train_steps", "2", "--overwrite")):
        prev = ("--prev", str(place / source), "--allow_strategy_change")
        assert main(command_of(learned, place, "next.toml", *prev, *more)) == 0


def test_scores_made_twice_and_the_report(learned: Path, place: Path, refused: list[str]) -> None:
    output = place / "scores"
    for images in ("1", "2"):
        score([place / "mine"], output, learned / "data", "--images", images, "--steps", "1")
    for _ in range(2):
        assert load_tool("conflicts").main([str(place / "mine"), "--json", str(output / "c")]) == 0
        assert load_tool("report").main([str(place / "mine")]) == 0


@pytest.mark.parametrize("form", ["lora:1", "peft", "diffusers", "checkpoint"])
def test_an_export_written_over_an_earlier_one(
    place: Path, toy_base: Path, refused: list[str], form: str
) -> None:
    output = place / ("folder" if form in ("peft", "checkpoint") else "file.safetensors")
    for _ in range(2):
        more = ["--base", str(toy_base)] if form == "checkpoint" else []
        command = [str(place / "mine"), "-o", str(output), "--as", form, *more]
        assert load_tool("export").main(command) == 0


def test_a_merge_written_over_a_file_that_was_there(place: Path, refused: list[str]) -> None:
    mine, other, third = (place / f"{name}.safetensors" for name in ("mine", "other", "third"))
    for copy in (other, third):
        shutil.copyfile(mine, copy)
    merge = load_tool("merge_adapters").main
    assert merge([str(mine), str(other), "-o", str(third)]) == 0
    before = other.read_bytes()
    assert merge([str(mine), str(other), "-o", str(other)]) != 0  # a part is no place for the sum
    assert other.read_bytes() == before
