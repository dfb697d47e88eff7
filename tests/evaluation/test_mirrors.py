"""References as the model could show them: through its autoencoder, at the size that it draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_runs import draw_pictures

from lcp_plugin.cli import main as train
from lcp_plugin.commands.evaluate import main as evaluate
from lcp_plugin.evaluation import evaluate as scoring
from lcp_plugin.evaluation.encoders import Encoder
from lcp_plugin.evaluation.mirrors import mirror_files
from lcp_plugin.evaluation.pictures import Sampling, Studio
from lcp_plugin.formats.pictures import read_size


def test_they_are_made_once_of_each_size_and_without_loading_the_base_again(
    toy_base: Path, pictures: Path, tmp_path: Path
) -> None:
    files = sorted((pictures / "disc0").iterdir())
    studio = Studio(str(toy_base), Sampling(images=1, steps=1))
    made = mirror_files(studio, tmp_path / "m", files)
    side = studio.live.native_side
    assert [read_size(file) for file in made] == [(side, side)] * len(files)
    before = [file.read_bytes() for file in made]
    again = Studio(str(toy_base), Sampling(images=1, steps=1))
    assert mirror_files(again, tmp_path / "m", files) == made
    assert "live" not in vars(again)
    made[0].write_bytes(before[0][:40])  # cut off by a kill
    mirror_files(again, tmp_path / "m", files)
    assert [file.read_bytes() for file in made] == before
    smaller = Studio(str(toy_base), Sampling(images=1, steps=1, size=side // 2))
    (one,) = mirror_files(smaller, tmp_path / "m", files[:1])
    assert read_size(one) == (side // 2, side // 2)


class SeesSizeAlone(Encoder):
    """Takes pictures of one width for the same thing."""

    name, device, fingerprint = "effnet", "cpu", "2" * 64

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.eye(2)[int(image.width > 64)] for image in images])


def test_no_concept_is_recognised_by_the_size_of_its_files(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(tmp_path / "data" / "disc1", side=128)  # the other's have 64 pixels
    monkeypatch.setattr(scoring, "load_encoder", lambda *_: SeesSizeAlone())
    assert train(["--config", str(write_config("run", max_train_steps=1))]) == 0
    run = tmp_path / "out" / "run"
    few = ("--metrics", "effnet", "--prompts", "1", "--images", "1", "--steps", "1")
    assert evaluate([str(run), *few, "--size", "64"]) == 0
    scores = json.loads((run / "evaluation" / "scores.json").read_text("utf-8"))
    found = scores["runs"][0]["recognition"]
    assert [row[-1]["share"] for row in found["looks"]] == [0.0, 0.0]  # told apart by nothing
