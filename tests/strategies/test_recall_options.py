"""Recall with several processes, the loss scaler, checkpointing, text encoders and validation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from proof_strategies import Slao
from toy_runs import assert_equal_tensors, read_all
from two_processes import launch

from lcp_plugin.errors import StrategyError
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.registry import create_strategy
from lcp_plugin.strategies.recall import Recall

Train = Callable[..., Any]
SHORT = ("images=2", "sample_steps=2", "weight=2", "preserve=0.25")
RECALL = {"strategy": "recall", "strategy_args": SHORT}


def rehearsals(run: Any) -> list[float]:
    """The rehearsal's error at every step that had one."""
    steps = read_steps(run.store.root / "logs" / "steps.jsonl")
    return [step["rehearsal"] for step in steps if "rehearsal" in step]


def test_two_processes_share_what_is_drawn_and_rehearse_different_parts_of_it(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    args = (f"folder={tmp_path.as_posix()}",)
    config = write_config("pair", strategy="plugin_samples:Ranks", strategy_args=args)
    launch(config, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    for task in (1, 2):
        first, second = (
            json.loads((tmp_path / f"rank{rank}_task{task}.json").read_text(encoding="utf-8"))
            for rank in (0, 1)
        )
        assert first["drawn"] == second["drawn"]
        assert first["learned"] == second["learned"]  # gradients met, the rehearsal's too
        assert len(first["rehearsed"]) == len(second["rehearsed"]) == 3
        assert first["rehearsed"] != second["rehearsed"]


def test_the_loss_scaler_scales_the_rehearsal_with_the_task_s_loss(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a power of two, so that not a bit differs once gradients are unscaled."""
    scales = []

    class Scaling(accelerate.Accelerator):  # type: ignore[misc]
        """Scales the loss in fp32 like mixed_precision = fp16."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def unscale_gradients(self, optimizer: Any = None) -> None:
            self.scaler.unscale_(optimizer.optimizer)
            scales.append(self.scaler.get_scale())

    plain = train("plain", **RECALL)
    monkeypatch.setattr(accelerate, "Accelerator", Scaling)
    scaled = train("scaled", **RECALL)
    assert scales == [1024.0] * 6
    assert_equal_tensors(read_all(plain.store), read_all(scaled.store))


def test_gradient_checkpointing_changes_nothing_but_rounding(train: Train) -> None:
    plain = train("plain", **RECALL)
    spared = train("spared", gradient_checkpointing=True, **RECALL)
    assert rehearsals(spared) == pytest.approx(rehearsals(plain), rel=1e-3)
    assert len(rehearsals(plain)) == 6


def test_text_encoders_learn_from_the_rehearsal_too(train: Train) -> None:
    """Under weight 0 and 4: the rehearsal's gradient reaches the text encoders' factors."""
    up = {}
    for weight in (0, 4):
        run = train(
            f"texts{weight}",
            network_train_unet_only=False,
            cache_text_encoder_outputs=False,
            strategy="recall",
            strategy_args=(*SHORT[:2], f"weight={weight}"),
        )
        assert len(rehearsals(run)) == 3
        adapter = run.store.folders()[-1].read_adapter()
        up[weight] = {n: f.up for n, f in adapter.items() if n.startswith("text_encoder")}
    assert up[0]
    moved = [name for name in up[0] if not torch.equal(up[0][name], up[4][name])]
    assert len(moved) > len(up[0]) / 2


def test_validation_sees_the_task_s_own_loss_beside_a_rehearsal(train: Train) -> None:
    run = train("held_out", validation_split=0.34, validate_every_n_steps=1, **RECALL)
    facts = [folder.lineage["training"] for folder in run.store.folders()]
    assert all("validation" in str(fact) for fact in facts)
    assert len(rehearsals(run)) == 6


def test_a_rehearsal_comes_once_a_step_however_many_batches_are_accumulated(train: Train) -> None:
    run = train("many", gradient_accumulation_steps=3, **RECALL)
    steps = read_steps(run.store.root / "logs" / "steps.jsonl")
    assert len(rehearsals(run)) == len(steps) == 6
    for step in steps:
        share = 0.25 if step["task_index"] == 1 else 1.0
        assert step["objective"] == pytest.approx(
            step["loss"] + 2 * share * step["rehearsal"], rel=1e-5
        )


def test_how_a_fresh_a_is_drawn_is_the_other_strategys_or_refused() -> None:
    assert create_strategy("recall", ["of=merge_init", "init=kaiming"]).inner.init == "kaiming"
    with pytest.raises(StrategyError, match="nonsense"):
        create_strategy("recall", ["init=nonsense"])
    with pytest.raises(StrategyError, match="starts A its own way"):
        Recall(of=Slao(), init="kaiming")
