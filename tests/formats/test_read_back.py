"""What is delivered is read back before it counts, in the commands that deliver it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lcp_plugin.cli import main
from lcp_plugin.formats.identity import file_model_hash

WriteConfig = Callable[..., Path]


@contextmanager
def a_disk_that_changes_a_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[Path]]:
    """The last byte of what is written for the file `name` comes out another one; the paths hit."""
    honest, hit = os.replace, []

    def replace(source: Any, target: Any) -> None:
        honest(source, target)
        if Path(target).name.startswith(f".{name}"):  # the temporary one that is read back
            with Path(target).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
            hit.append(Path(target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        yield hit


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error line since the last call."""
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    lines = [x for x in captured.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, captured
    return lines[0]


def test_a_deliverable_that_does_not_read_back_leaves_the_old_one(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["--config", str(write_config("whole"))]) == 0
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 0
    deliverable = tmp_path / "out" / "run.safetensors"
    before = deliverable.read_bytes()
    config = write_config("run")
    capsys.readouterr()
    with a_disk_that_changes_a_bit(monkeypatch, "run.safetensors") as hit:
        assert main(["--config", str(config)]) == 1
    assert hit
    assert "run.safetensors does not read back" in error_of(capsys)
    assert deliverable.read_bytes() == before
    assert (tmp_path / "out" / "run" / "02_disc1" / "lineage.json").is_file()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert main(["--config", str(config)]) == 0
    wanted = file_model_hash(tmp_path / "out" / "whole.safetensors")
    assert file_model_hash(deliverable) == wanted


def test_an_interim_file_that_does_not_read_back_is_not_there(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config("run", tasks=(0,), save_every_n_steps=1)
    with a_disk_that_changes_a_bit(monkeypatch, "run-") as hit:
        assert main(["--config", str(config)]) == 1
    assert hit
    assert "does not read back" in error_of(capsys)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert main(["--config", str(config)]) == 0
    made = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert made == [
        "run-step00000001.safetensors",
        "run-step00000002.safetensors",
        "run.safetensors",
    ]


def test_a_precision_that_cannot_hold_the_update_is_told(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"tasks": (0,), "save_precision": "fp16", "max_train_steps": 1}
    assert main(["--config", str(write_config("coarse", learning_rate=1e-7, **given))]) == 0
    assert "fp16 cannot hold all of this LoRA" in capsys.readouterr().err
    assert main(["--config", str(write_config("fine", learning_rate=1e-2, **given))]) == 0
    assert "cannot hold" not in capsys.readouterr().err


def test_a_value_beyond_the_precision_is_one_line_and_another_precision_delivers_it(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"tasks": (0,), "max_train_steps": 1, "optimizer_type": "SGD"}
    given |= {"optimizer_args": ["momentum=0.0"], "max_grad_norm": 0.0, "learning_rate": 1e9}
    status = main(["--config", str(write_config("run", save_precision="fp16", **given))])
    assert status == 1
    assert "save_precision = bf16 or float" in error_of(capsys)
    assert not (tmp_path / "out" / "run.safetensors").exists()
    assert main(["--config", str(write_config("run", save_precision="float", **given))]) == 0
    assert (tmp_path / "out" / "run.safetensors").is_file()
