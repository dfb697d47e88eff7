"""What a small UNet predicts, and references for it: weights with a delta, added in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from toy_values import make_task, pretend_training, seeded

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, Stacked
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.sdxl.adapted_unet import run_unet
from lcp_plugin.sdxl.layers import choose_targets, find_layers, layer_shape


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = seeded(5)
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "text_embeds": torch.randn(2, 16, generator=generator),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(2, 1),
    }
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]), conditioning


def predict(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return run_unet(model, *inputs(), dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def targets_of(unet: nn.Module, targets: str = "attention") -> dict[str, nn.Module]:
    layers = find_layers({"unet": unet})
    return {name: layers[name] for name in choose_targets(layers, targets)}


def spec_of(unet: nn.Module, index: int, targets: str = "attention", rank: int = 2) -> AdapterSpec:
    shapes = {name: layer_shape(layer) for name, layer in targets_of(unet, targets).items()}
    return AdapterSpec(shapes=shapes, rank=rank, alpha=2.0 * rank, seed=index)


def with_delta(unet: nn.Module, delta: Delta) -> nn.Module:
    """A copy whose weights are W_0 + D, added in float64 and rounded once: the reference."""
    copied = copy.deepcopy(unet)
    layers = find_layers({"unet": copied})
    for name, entry in delta.items():
        if isinstance(entry, Stacked):
            dense = entry.up.double() @ entry.down.double()
        else:
            dense = entry.weight.double()
        weight = layers[name].weight
        assert isinstance(weight, nn.Parameter)
        weight.data = (weight.double() + dense.view(weight.shape)).to(weight.dtype)
    return copied


def weights_of(unet: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def small_delta(unet: nn.Module, seed: int = 1, size: float = 0.05) -> Delta:
    """A low-rank change of every attention projection, big enough to show."""
    adapter = pretend_training(spec_of(unet, seed).gaussian(), seed)
    return Delta.of(adapter).weighted(size)


def learn_on(unet: nn.Module, strategy: Strategy, tasks: int) -> Carry:
    carry = Carry()
    for index in range(1, tasks + 1):
        start = strategy.begin_task(make_task(index), carry, spec_of(unet, index))
        trained = pretend_training(start.adapter, index)
        scaled = {n: Factors(f.down, 0.03 * f.up, f.alpha) for n, f in trained.items()}
        carry = strategy.end_task(make_task(index), carry, Adapter(scaled))
    return carry


def sdxl_unet() -> Any:
    """SDXL's own UNet, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
