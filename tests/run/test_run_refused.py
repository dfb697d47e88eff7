"""What a run refuses, in one line."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import LAW_2, run_and_kill, run_for_errors
from PIL import Image

from lcp_plugin.cli import main
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.tensors import read_tensors, write_tensors
from lcp_plugin.store.run_folder import RunStore

Train = Callable[..., Any]


def test_a_finished_run_refuses_to_start_over_and_says_the_way_out(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config("run", tasks=(0,))
    assert main(["--config", str(config)]) == 0
    before = (tmp_path / "out" / "run.safetensors").read_bytes()
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "finished" in text
    assert "--overwrite" in text
    assert "--output_name" in text
    assert (tmp_path / "out" / "run.safetensors").read_bytes() == before
    assert main(["--config", str(config), "--overwrite"]) == 0


def test_a_changed_config_refuses_to_resume_and_names_the_keys(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", **LAW_2)
    assert run_and_kill(config, 30)[0] == -signal.SIGKILL  # behind a saved state
    status, text = run_for_errors(capsys, config, "--learning_rate", "0.5")
    assert status == 1
    assert "learning_rate" in text
    assert "0.5" in text
    assert "max_train_steps" not in text


def test_a_chain_with_another_strategy_must_be_asked_for(
    train: Train, write_config: Callable[..., Path]
) -> None:
    first = train("first", tasks=(0,), strategy="naive")
    prev = str(first.store.root)
    with pytest.raises(LineageError, match="--allow_strategy_change"):
        train("second", tasks=(1,), strategy="magmax", prev=prev)
    run = train("second", tasks=(1,), strategy="magmax", prev=prev, allow_strategy_change=True)
    assert run.store.folders()[-1].index == 2


def test_a_parent_of_another_base_is_refused_before_a_model_is_loaded(
    train: Train, toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.run import opening

    first = train("first", tasks=(0,))
    other = tmp_path / "other_base"
    shutil.copytree(toy_base, other)
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = read_tensors(weights)
    write_tensors(weights, {k: t + 1 for k, t in tensors.items()}, {"format": "pt"})
    monkeypatch.setattr(opening, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(LineageError, match="Chain runs on one base"):
        train(
            "second",
            tasks=(1,),
            prev=str(first.store.root),
            pretrained_model_name_or_path=str(other),
        )


def test_nan_stops_the_run_and_keeps_the_last_good_state(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lcp_plugin.training import passes

    config, honest, steps = write_config("run", max_train_steps=6), passes.compute_loss, []

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        loss = honest(*args, **kwargs)
        return loss * float("nan") if len(steps) == 4 else loss

    monkeypatch.setattr(passes, "compute_loss", poisoned)
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "step 4" in text
    assert "learning_rate" in text
    store = RunStore(tmp_path / "out", "run")
    assert [p.name for p in (store.root / "state").iterdir()] == ["01_disc0_step00000002"]
    assert main(["--config", str(config)]) == 0


def test_too_little_disk_is_refused_before_training(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = write_config("run")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "GB free" in text
    assert not (tmp_path / "out" / "run" / "01_disc0").exists()


def test_resume_refuses_changed_images(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], pictures: Path
) -> None:
    config = write_config("run", **LAW_2)
    saved = config.parent / "out" / "run" / "state"
    while not list(saved.glob("*/state.json")):  # each try is killed a little further on
        assert run_and_kill(config, 12)[0] == -signal.SIGKILL
    Image.new("RGB", (64, 64), "lime").save(pictures / "disc0" / "00.png")
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "changed" in text
