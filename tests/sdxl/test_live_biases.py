"""Changes of biases on a live model: put on, away for a while, and taken off to the bit."""

from __future__ import annotations

import torch
from torch import nn
from toy_unets import predict

from lcp_plugin.biases import Biases
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet


def changes_of(model: AdaptedUNet) -> Biases:
    return Biases(
        {
            name: torch.linspace(-1, 1, len(layer.bias))  # type: ignore[arg-type]
            for name, layer in model.layers.items()
            if layer.bias is not None
        }
    )


def test_the_base_is_shown_without_them_and_comes_back_to_the_bit(unet: nn.Module) -> None:
    before = predict(unet)
    model = AdaptedUNet({"unet": unet})
    model.biases.set(changes_of(model))
    changed = predict(model)
    assert float((changed - before).abs().max()) > 1e-2
    with model.using("base"):
        assert torch.equal(predict(model), before)
    for weights in ("carry", "start", "trained"):
        with model.using(weights):  # type: ignore[arg-type]
            assert torch.equal(predict(model), changed)
    model.biases.set(changes_of(model).weighted(0.5))
    model.release()
    assert torch.equal(predict(model), before)


def test_small_changes_of_half_precision_biases_are_right_in_the_mean() -> None:
    layer = nn.Linear(1, 20_000).to(torch.bfloat16).requires_grad_(False)
    layer.bias.data.fill_(1.0)
    model = AdaptedUNet({"unet": nn.ModuleDict({"conv_in": layer})})
    model.biases.set(Biases({"unet.conv_in": torch.full((20_000,), 1e-3)}))  # an eighth of a place
    error = float(layer.bias.float().mean()) - 1.001
    assert abs(error) < 6 * (2**-7 * 0.33) / 20_000**0.5  # p = .128: sqrt(p (1 - p)) = .33
