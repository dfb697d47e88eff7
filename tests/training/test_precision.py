"""Types that weights are stored and trained in, and torch_compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from toy_live import first_linear, predict
from toy_runs import first_adapter

Train = Callable[..., Any]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fp8_base_stores_a_byte_a_weight_and_predicts_alike(
    make_base: Callable[..., Any], precision: str
) -> None:
    from lcp_plugin.sdxl.stored import FLOAT8

    plain = make_base(mixed_precision=precision)
    before = predict(plain)
    small = make_base(mixed_precision=precision, fp8_base_unet=True)
    layers = [m for m in small.pipeline.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(m.stored.dtype is FLOAT8 for m in layers)
    assert all(m.weight.untyped_storage().nbytes() <= 8 for m in layers)
    assert not hasattr(first_linear(small.pipeline.text_encoder), "stored")
    after = predict(small)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.2  # three bits of mantissa: 3% a weight
    rounded = {  # what a base with rounded weights predicts, stored in full
        name: m.weight.data.float().to(FLOAT8).to(m.weight.dtype)
        for name, m in plain.pipeline.unet.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    for name, m in plain.pipeline.unet.named_modules():
        if name in rounded:
            m.weight.data = rounded[name]
    assert torch.equal(predict(plain), after)


def test_fp8_text_encoders_stay_small_when_they_move(make_base: Callable[..., Any]) -> None:
    held = make_base(fp8_base=True)
    layer = first_linear(held.pipeline.text_encoder)
    held.pipeline.text_encoder.to("cpu").to(torch.float64).to(torch.float32)
    assert layer.stored.dtype is torch.float8_e4m3fn
    assert layer.weight.untyped_storage().nbytes() <= 8
    states = held.encode_prompts(["a dog"])["encoder_hidden_states"]
    assert bool(torch.isfinite(states).all())


def test_a_chain_on_an_fp8_base_delivers_updates_in_full(train: Train) -> None:
    run = train("run", tasks=(0, 1), fp8_base=True, strategy="merge_init")
    last = run.store.folders()[-1]
    assert last.lineage["training"]["fused"]["fused"] == 0  # nothing is rounded into float8
    total = last.read_carry().total
    expected = [f.read_adapter() for f in run.store.folders()]
    for name in total:
        summed = expected[0][name].update() + expected[1][name].update()
        assert torch.allclose(total[name].dense(), summed, atol=1e-6)


def test_full_bf16_keeps_factors_in_bf16(make_base: Callable[..., Any], train: Train) -> None:
    run = train("run", tasks=(0,), mixed_precision="bf16", full_bf16=True)
    plain = train("plain", tasks=(0,), mixed_precision="bf16")
    full, half = first_adapter(plain), first_adapter(run)
    assert all(torch.equal(f.up, f.up.bfloat16().float()) for f in half.values())
    assert any(not torch.equal(f.up, f.up.bfloat16().float()) for f in full.values())


def test_full_fp16_lets_the_scaler_unscale_half_gradients() -> None:
    from lcp_plugin.sdxl.precision import allow_half_gradients

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes its scale a tensor
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.grad = torch.full((2,), 16.0, dtype=torch.float16)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
    allow_half_gradients(scaler)
    scaler._per_optimizer_states.clear()
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [2.0, 2.0]


def test_the_vae_runs_in_fp32_whatever_the_precision(make_base: Callable[..., Any]) -> None:
    for given in ({}, {"no_half_vae": True}):
        held = make_base(mixed_precision="bf16", **given)
        assert held.pipeline.vae.dtype is torch.float32
        assert held.pipeline.unet.dtype is torch.bfloat16


def test_torch_compile_goes_through_the_backend_that_is_named(
    make_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import config

    asked: list[str] = []
    monkeypatch.setattr(config, "skip_nnmodule_hook_guards", True)
    monkeypatch.setattr(nn.Module, "compile", lambda self, backend: asked.append(backend))
    make_base()
    assert asked == []
    make_base(torch_compile=True, dynamo_backend="aot_eager")
    assert asked == ["aot_eager"]
    assert not config.skip_nnmodule_hook_guards  # else adapters put on later are not seen
