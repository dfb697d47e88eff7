"""On a card: the options that only a card shows. LCP_TEST_DEVICE=cpu tries the same without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import DEVICE, Train, difference, read_losses, state_fact, train_on
from toy_runs import read_all

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

HALF_LOSSES = {"bf16": 3e-2, "fp16": 1e-2}  # relative to fp32's
on_card_only = pytest.mark.skipif(DEVICE == "cpu", reason="has no meaning on a CPU")


def assert_close_losses(run: Any, other: Any, tolerance: float, name: str) -> None:
    """Loss by loss, and the largest difference stated."""
    pairs = list(zip(read_losses(run), read_losses(other), strict=True))
    apart = max(abs(a - b) / b for a, b in pairs)
    state_fact(name, apart)
    assert apart <= tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(train: Train, precision: str) -> None:
    half = train_on(DEVICE, train, "half", (0, 1), mixed_precision=precision)
    full = train_on(DEVICE, train, "full", (0, 1))
    name = f"losses of {precision} against fp32"
    assert_close_losses(half, full, HALF_LOSSES[precision], name)
    assert all(t.isfinite().all() for t in read_all(half.store).values())


def test_an_fp16_overflow_skips_the_step_and_the_scale_comes_down(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        pytest.skip("accelerate scales gradients on a card only")
    from lcp_plugin.strategies import BUILT_IN

    scales: list[float] = []
    moved: list[bool] = []

    def overflow(self: Any, step: Any) -> None:
        scales.append(float(step.model.desk.accelerator.scaler.get_scale()))

    def look(self: Any, step: Any) -> None:
        moved.append(any(bool(up.abs().max() > 0) for _, up in step.parameters.values()))

    def burst(self: Any, step: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * (1e30 if step.index == 0 else 1.0)

    monkeypatch.setattr(BUILT_IN["merge_init"], "before_optimizer_step", overflow)
    monkeypatch.setattr(BUILT_IN["merge_init"], "after_optimizer_step", look)
    monkeypatch.setattr(BUILT_IN["merge_init"], "before_backward", burst)
    run = train_on(DEVICE, train, "run", mixed_precision="fp16", strategy="merge_init")
    state_fact("fp16 scales by step, the first overflows", scales)
    assert scales[1] < scales[0], "the scale did not come down"
    assert moved[0] is False, "the overflown step was taken"
    assert moved[-1] is True
    assert all(t.isfinite().all() for t in read_all(run.store).values())


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedAdamW"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_quantised_optimizers_train(train: Train, optimizer: str, precision: str) -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    options = {"optimizer_type": optimizer, "mixed_precision": precision, "network_dim": 16}
    run = train_on(DEVICE, train, "run", (0, 1), **options)
    used = run.store.folders()[-1].lineage["training"]["optimizer"]
    assert used.startswith(f"bitsandbytes.optim.{optimizer}(")
    found = read_all(run.store)
    assert all(t.isfinite().all() for t in found.values())
    assert any("up" in key and t.abs().max() > 0 for key, t in found.items())


@on_card_only
def test_xformers_and_plain_attention_give_what_sdpa_gives(train: Train) -> None:
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    sdpa = train_on(DEVICE, train, "sdpa", mixed_precision="bf16", sdpa=True)
    other = train_on(DEVICE, train, "other", mixed_precision="bf16", xformers=True)
    kinds = {type(p).__name__ for p in other.base.pipeline.unet.attn_processors.values()}
    state_fact("attention with xformers", sorted(kinds))
    assert_close_losses(other, sdpa, 2e-2, "xformers against SDPA, bf16")


def test_plain_attention_gives_what_sdpa_gives(train: Train) -> None:
    sdpa = train_on(DEVICE, train, "sdpa", sdpa=True)
    plain = train_on(DEVICE, train, "plain", sdpa=False)
    assert_close_losses(plain, sdpa, 1e-3, "plain attention against SDPA, fp32")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_fp8_base_trains_close_to_the_whole_one(train: Train, precision: str) -> None:
    small = train_on(DEVICE, train, "small", (0, 1), mixed_precision=precision, fp8_base=True)
    whole = train_on(DEVICE, train, "whole", (0, 1), mixed_precision=precision)
    assert_close_losses(small, whole, 0.15, f"fp8 base against its own, {precision}")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_checkpointing_changes_memory_alone(train: Train, precision: str) -> None:
    options = {"mixed_precision": precision, "network_dropout": 0.1}
    saved = train_on(DEVICE, train, "saved", gradient_checkpointing=True, **options)
    plain = train_on(DEVICE, train, "plain", **options)
    apart = difference(read_all(saved.store), read_all(plain.store))
    state_fact(f"checkpointing against none, {precision}", apart)
    assert_close_losses(saved, plain, 1e-2, f"losses with checkpointing, {precision}")
    assert apart <= 0.1


@on_card_only
def test_a_compiled_unet_gives_what_it_gave(train: Train) -> None:
    plain = train_on(DEVICE, train, "plain", mixed_precision="bf16", max_train_steps=3)
    compiled = train_on(
        DEVICE,
        train,
        "compiled",
        mixed_precision="bf16",
        max_train_steps=3,
        torch_compile=True,
        dynamo_backend="aot_eager",
    )
    assert_close_losses(compiled, plain, 2e-2, "compiled against plain, bf16")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_text_encoders_learn_too(train: Train, precision: str) -> None:
    run = train_on(
        DEVICE,
        train,
        "run",
        (0, 1),
        mixed_precision=precision,
        network_train_unet_only=False,
        cache_text_encoder_outputs=False,
    )
    adapter = run.store.folders()[-1].read_adapter()
    parts = {name.split(".")[0] for name, f in adapter.items() if f.up.abs().max() > 0}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_samples_and_an_evaluation_are_drawn_and_scored(
    train: Train, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", exc_type=ImportError)
    from lcp_plugin.evaluation.command import run_command

    options = {"samples_per_task": 1, "sample_steps": 2, "mixed_precision": precision}
    run = train_on(DEVICE, train, "run", (0, 1), **options)
    assert len(list((run.store.root / "samples").rglob("*.png"))) > 2
    arguments = [str(run.store.root), "--device", DEVICE, "--images", "2", "--prompts", "1"]
    arguments += ["--steps", "2", "--output", str(tmp_path / "scores"), "--size", "48"]
    run_command(arguments)
    scores = list((tmp_path / "scores").glob("*.json"))
    assert scores
    assert "nan" not in json.dumps([json.loads(p.read_text()) for p in scores]).lower()
