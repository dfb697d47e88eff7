"""base_dtype: the base stored in half precision and computed in full."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl import precision as hardware
from lcp_plugin.sdxl.adapted_unet import run_unet
from lcp_plugin.sdxl.live_base import LiveBase, build_live_base
from lcp_plugin.sdxl.load import load_pipeline
from lcp_plugin.sdxl.stored import StoredConv2d, StoredLinear, is_native


@pytest.fixture
def make(toy_base: Path) -> Callable[..., LiveBase]:
    """make(**options) -> a LiveBase on the toy base, without a run."""

    def build(**given: Any) -> LiveBase:
        options = Options(network_train_unet_only=True, **given)
        pipeline = load_pipeline(str(toy_base), hardware.Precision.of(options).loaded)
        return build_live_base(options, pipeline, torch.device("cpu"))

    return build


def predict(base: LiveBase) -> torch.Tensor:
    """The UNet's output for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    unet, encoder = base.pipeline.unet, base.pipeline.text_encoder_2
    batch = {
        "encoder_hidden_states": torch.randn(
            1, 77, unet.config.cross_attention_dim, generator=generator
        ),
        "text_embeds": torch.randn(1, encoder.config.projection_dim, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return run_unet(base.adapted, latents, torch.tensor([500]), batch, base.dtype)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_stored_base_predicts_as_its_rounded_weights_in_fp32(
    make: Callable[..., LiveBase], name: str, dtype: torch.dtype
) -> None:
    small = make(base_dtype=name)
    layers = [m for m in small.pipeline.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers
    for layer in layers:
        assert isinstance(layer, StoredLinear | StoredConv2d)
        assert layer.stored.dtype is dtype
        assert layer.weight.untyped_storage().nbytes() <= 8
    assert small.dtype is torch.float32
    assert all(p.dtype is torch.float32 for p in small.pipeline.unet.parameters())
    rounded = make()
    for parameter in rounded.pipeline.unet.parameters():
        parameter.data = parameter.data.to(dtype).float()
    assert torch.equal(predict(small), predict(rounded))
    lossless = name == "fp16"  # which the toy base's files are in
    assert torch.equal(predict(small), predict(make())) is lossless


def test_a_chain_on_a_stored_base_learns_and_delivers_its_updates_in_full(
    train: Callable[..., Any],
) -> None:
    run = train("run", tasks=(0, 1), base_dtype="bf16", strategy="merge_init")
    last = run.store.folders()[-1]
    assert last.lineage["training"]["fused"]["fused"] == 0
    factors = [folder.read_adapter() for folder in run.store.folders()]
    for module, entry in last.read_carry().total.items():
        summed = factors[0][module].update() + factors[1][module].update()
        assert float(summed.norm()) > 0
        assert torch.allclose(entry.dense(), summed, atol=1e-6)


def test_emulated_arithmetic_is_pointed_out_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "is_native", lambda dtype: dtype is torch.float32)
    with caplog.at_level(logging.WARNING):
        for precision in ("no", "bf16"):
            dtype = hardware.Precision.of(Options(mixed_precision=precision)).computed
            hardware.warn_of_slow_half(dtype, torch.device("cpu"))
            hardware.warn_of_slow_half(dtype, torch.device("cuda"))
    assert len(caplog.records) == 1
    assert "--mixed_precision no --base_dtype bf16" in caplog.text


def test_full_precision_is_native_everywhere() -> None:
    assert is_native(torch.float32)
