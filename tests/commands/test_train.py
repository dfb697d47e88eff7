"""`lcp train`: the training command in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcp_plugin.commands.front import main


def test_it_trains_and_says_how_idle_gpus_would_be_used(
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = write_config("alone", (0,), max_train_steps=1, samples_per_task=0)
    assert "WORLD_SIZE" not in os.environ
    assert main(["train", "--config", str(config)]) == 0
    captured = capsys.readouterr()
    assert "learned      disc0" in captured.out
    assert (tmp_path / "out" / "alone.safetensors").is_file()
    assert "2 GPUs are here, one is used" in captured.err
    assert "accelerate launch --multi_gpu -m lcp_plugin train" in captured.err
