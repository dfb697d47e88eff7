"""What follows the last task, and a kill in the middle of it: the same command makes the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcp_plugin.cli import main
from lcp_plugin.evaluation.encoders import Encoder
from lcp_plugin.run import follow_up

WriteConfig = Callable[..., Path]


class Killed(BaseException):
    """What no except clause of ours catches."""


def die(*args: Any, **kwargs: Any) -> None:
    """In the place of what was being made."""
    raise Killed


def test_a_report_that_a_kill_left_out_is_made_by_the_same_command(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lcp_plugin.run import opening

    config = write_config("run", tasks=(0,), export=["lora:1"])
    with monkeypatch.context() as patched:
        patched.setattr(follow_up, "write_report", die)
        with pytest.raises(Killed):
            main(["--config", str(config)])
    report = tmp_path / "out" / "run" / "report.html"
    exported = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(exported) == 2
    assert not report.exists()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(opening, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
        assert main(["--config", str(config)]) == 0
        printed = capsys.readouterr().out
        assert str(report) in printed
        assert "exported" not in printed  # what was made is not made twice
        assert report.is_file()
        assert main(["--config", str(config)]) == 1
        assert "is finished" in capsys.readouterr().err
        (tmp_path / "out" / next(n for n in exported if n != "run.safetensors")).unlink()
        assert main(["--config", str(config)]) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == exported


def test_scores_that_failed_are_made_once_they_can_be_and_stand_in_the_report(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lcp_plugin.evaluation import command

    config, made = write_config("run", tasks=(0,), evaluate=["clip_i"]), []

    def fail(arguments: list[str]) -> str:
        raise ImportError("no module named open_clip")

    def score(arguments: list[str]) -> str:
        made.append(arguments)
        file = Path(arguments[0]) / "evaluation" / "scores.json"
        file.parent.mkdir()
        file.write_text("{}", encoding="utf-8")
        return "scored"

    monkeypatch.setattr(command, "run_command", fail)
    assert main(["--config", str(config)]) == 0
    report = tmp_path / "out" / "run" / "report.html"
    first = report.stat().st_mtime_ns
    monkeypatch.setattr(command, "run_command", score)
    assert main(["--config", str(config)]) == 0
    assert len(made) == 1
    assert report.stat().st_mtime_ns > first
    assert main(["--config", str(config)]) == 1
    assert len(made) == 1


class ThinksOfDisc1(Encoder):
    """Knows the training pictures apart, and takes whatever was drawn for the second's."""

    name, device, fingerprint = "effnet", "cpu", "1" * 64

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.eye(2)[self._of(image)] for image in images])

    def _of(self, image: Image.Image) -> int:
        is_reference = image.getpixel((0, 0)) == (255, 255, 255)
        return 0 if is_reference and image.getpixel((28, 28)) == (220, 20, 60) else 1  # crimson


def test_a_scored_run_ends_with_what_is_still_recognised_on_console_page_and_grid(
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lcp_plugin.evaluation import evaluate
    from lcp_plugin.run.samples import mark_grid

    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: ThinksOfDisc1())
    monkeypatch.setattr(evaluate, "mirror_files", lambda *given: list(given[2]))  # a toy's is noise
    shown = {"samples_per_task": 1, "sample_steps": 1}
    scored = {"evaluate": ["effnet"], "evaluate_images": 2, "evaluate_prompts": 1}
    run = tmp_path / "out" / "run"
    assert main(["--config", str(write_config("run", tasks=(0, 1), **shown, **scored))]) == 0
    lost = "disc0 never was recognised, it looks like disc1"
    assert f"still recognised: 1 of 2; {lost}" in capsys.readouterr().out.split("\n")
    scores = json.loads((run / "evaluation" / "scores.json").read_text("utf-8"))
    found = scores["runs"][0]["recognition"]
    assert (found["recognised"], found["turned_into"]) == (["disc1"], {"disc0": "disc1"})
    assert [[look and look["share"] for look in row] for row in found["looks"]] == [
        [0.0, 0.0],
        [None, 1.0],
    ]
    page = (run / "report.html").read_text("utf-8")
    assert '<p class="lead">One of two concepts is still recognised at the end: sks1 disc.' in page
    grid = run / "samples" / "grid.png"
    marked = grid.read_bytes()
    assert mark_grid(run) == grid
    assert grid.read_bytes() == marked  # it was marked at the end of the run
    with Image.open(grid) as picture:
        corner = picture.convert("L").crop((455, 37, 490, 70))  # of disc0 after disc1
    assert corner.getextrema() == (0, 255)
    for file in (run / "evaluation").glob("scores.json"):
        file.unlink()
    assert mark_grid(run) is None


def test_a_longer_run_gets_a_report_of_its_own(write_config: WriteConfig, tmp_path: Path) -> None:
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 0
    report = tmp_path / "out" / "run" / "report.html"
    assert "disc1" not in report.read_text(encoding="utf-8")
    assert main(["--config", str(write_config("run", tasks=(0, 1)))]) == 0
    assert "disc1" in report.read_text(encoding="utf-8")
