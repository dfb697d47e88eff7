"""The network for sd-scripts stands on the trainer's own sites: what that brings it."""

from __future__ import annotations

import torch
from torch import nn
from toy_values import seeded

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.sdxl.kohya_network import LoraNetwork
from lcp_plugin.sdxl.rounding import measure_fuse
from lcp_plugin.sdxl.sites import fuse_for_good

NAME = "unet.mid_block.attentions.0.proj_in"


def network_on(layer: nn.Module) -> LoraNetwork:
    return LoraNetwork(1.0, {NAME: layer}, {"dropout": 0.0})


def factors(seed: int, size: float = 1.0) -> Factors:
    down, up = (torch.randn(s, generator=seeded(seed)) for s in ((2, 16), (12, 2)))
    return Factors(down, size * up, 2.0)


def test_deltas_beside_a_half_precision_layer_add_up() -> None:
    layer = nn.Linear(16, 12).to(torch.bfloat16).requires_grad_(False)
    before = layer.weight.detach().clone()
    network = network_on(layer)
    deltas = [Delta({NAME: Stacked(f.up, f.down, (2,))}) for f in (factors(1), factors(2))]
    for delta in deltas:
        network.set_base(delta)
    assert torch.equal(layer.weight, before)
    x = torch.randn(3, 16, generator=seeded(3)).bfloat16()
    wanted = nn.functional.linear(x, before, layer.bias).float()
    for delta in deltas:
        wanted = wanted + x.float() @ delta[NAME].dense().t()
    assert (layer(x).float() - wanted).norm() < 0.02 * wanted.norm()


def test_what_is_fused_into_half_precision_keeps_a_small_delta_in_the_mean() -> None:
    layer = nn.Linear(128, 128, bias=False).to(torch.bfloat16).requires_grad_(False)
    layer.weight.data.normal_(0, 0.03, generator=seeded(1))
    before = layer.weight.float()
    entry = Dense(1e-5 * torch.randn(128, 128, generator=seeded(2)))
    nearest = measure_fuse(before, entry, (before + entry.weight).bfloat16()).shares()
    fuse_for_good(NAME, layer, entry)
    fused = measure_fuse(before, entry, layer.weight.detach()).shares()
    assert nearest["missing_share"] > 0.5
    assert fused["missing_share"] < 0.2


def test_a_norm_is_limited_in_the_factors_that_train() -> None:
    network = network_on(nn.Linear(16, 12).requires_grad_(False))
    start = factors(1)
    network.set_factors(Adapter({NAME: start}), frozenset({"B"}))
    norm = float(start.update().norm())
    assert network.apply_max_norm_regularization(norm / 2, "cpu")[0] == 1
    limited = network.trained()[NAME]
    assert torch.equal(limited.down, start.down)
    torch.testing.assert_close(limited.update(), start.update() / 2)
