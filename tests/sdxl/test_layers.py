"""Adapters on a live UNet: what it predicts, what is trained, and other weights for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_unets import (
    inputs,
    predict,
    relative,
    small_delta,
    spec_of,
    targets_of,
    weights_of,
    with_delta,
)
from toy_values import pretend_training, seeded

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.errors import LineageError
from lcp_plugin.sdxl.adapted_linear import AdaptedLinear
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet, run_unet
from lcp_plugin.sdxl.layers import find_layers, layer_kernel, layer_shape

# ------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_an_adapter_predicts_what_its_update_fused_predicts(unet: nn.Module, targets: str) -> None:
    trained = pretend_training(spec_of(unet, 1, targets).gaussian(), 1)
    adapter = Adapter({n: Factors(f.down, 0.1 * f.up, f.alpha) for n, f in trained.items()})
    expected = predict(with_delta(unet, Delta.of(adapter)))
    model = AdaptedUNet({"unet": unet})
    model.attach(adapter)
    assert relative(predict(model), expected) < 1e-5
    model.detach()
    assert torch.equal(predict(model), predict(unet))


def test_factors_come_back_as_they_were_attached(adapted: AdaptedUNet, unet: nn.Module) -> None:
    adapter = pretend_training(spec_of(unet, 1).gaussian(), 1)
    adapted.attach(adapter)
    back = adapted.trained()
    assert set(back) == set(adapter)
    for name, factors in adapter.items():
        assert torch.equal(back[name].down, factors.down)
        assert torch.equal(back[name].up, factors.up)
        assert back[name].alpha == factors.alpha


def test_training_on_the_model_does_not_touch_the_start(adapted: AdaptedUNet, unet: Any) -> None:
    adapter = spec_of(unet, 1).gaussian()
    before = {n: f.up.clone() for n, f in adapter.items()}
    adapted.attach(adapter)
    with torch.no_grad():
        for pair in adapted.pair_of.values():
            pair.up.add_(1.0)
    assert all(torch.equal(f.up, before[n]) for n, f in adapter.items())
    trained = adapted.trained()
    with torch.no_grad():
        for pair in adapted.pair_of.values():
            pair.up.add_(1.0)
    assert all(torch.equal(f.up, before[n] + 1) for n, f in trained.items())


@pytest.mark.parametrize("trainable", [{"A", "B"}, {"A"}, {"B"}])
def test_only_the_trainable_factors_get_gradients(
    adapted: AdaptedUNet, unet: nn.Module, trainable: set[str]
) -> None:
    adapted.attach(pretend_training(spec_of(unet, 1).gaussian(), 1), frozenset(trainable))
    run_unet(adapted, *inputs(), torch.float32).square().mean().backward()
    for pair in adapted.pair_of.values():
        assert (pair.down.grad is not None) == ("A" in trainable)
        assert (pair.up.grad is not None) == ("B" in trainable)
    assert all(p.grad is None for p in unet.parameters())


# -------------------------------------------------------------------------- other weights, briefly


@pytest.mark.parametrize("carry_as", ["fuse", "branch"])
def test_using_shows_the_base_the_start_the_carry_and_comes_back(
    unet: nn.Module, carry_as: str
) -> None:
    base, total = small_delta(unet, 1), small_delta(unet, 2)
    grown = pretend_training(spec_of(unet, 3).gaussian(), 3)
    start = Adapter({n: Factors(f.down, 0.1 * f.up, f.alpha) for n, f in grown.items()})
    expected = {
        "base": predict(unet),
        "start": predict(with_delta(unet, base + Delta.of(start))),
        "carry": predict(with_delta(unet, total)),
    }
    model = AdaptedUNet({"unet": unet})
    model.set_base(base, carry_as)
    model.set_carry(total)
    model.attach(start)
    with torch.no_grad():
        for pair in model.pair_of.values():
            pair.up.mul_(-2.0)
    now = predict(model)
    weights = weights_of(unet)
    for name, wanted in expected.items():
        with model.using(name):  # type: ignore[arg-type]
            shown = predict(model)
        assert relative(shown, wanted) < 1e-5, name
        assert relative(shown, now) > 1e-3, name
        assert torch.equal(predict(model), now)
    with model.using("trained"):
        assert torch.equal(predict(model), now)
    assert all(torch.equal(w, weights[n]) for n, w in weights_of(unet).items())


def test_using_the_base_is_exact_to_the_bit(unet: nn.Module) -> None:
    before = predict(unet)
    model = AdaptedUNet({"unet": unet})
    for carry_as in ("fuse", "branch"):
        model.set_base(small_delta(unet), carry_as)
        model.attach(pretend_training(spec_of(unet, 1).gaussian(), 1))
        with model.using("base"):
            assert torch.equal(predict(model), before)


def test_the_carry_shows_modules_that_neither_base_nor_adapter_touch(unet: nn.Module) -> None:
    total = small_delta(unet, 2)
    few = dict(list(spec_of(unet, 1).shapes.items())[:3])
    model = AdaptedUNet({"unet": unet})
    model.set_carry(total)  # as under `independent`: nothing is in the base
    model.attach(AdapterSpec(few, 2, 2.0, 1).gaussian())
    expected = predict(with_delta(unet, total))
    before = predict(unet)
    with model.using("carry"):
        assert relative(predict(model), expected) < 1e-5
    assert torch.equal(predict(model), before)


def test_an_error_inside_using_still_brings_the_model_back(
    adapted: AdaptedUNet, unet: nn.Module
) -> None:
    adapted.set_base(small_delta(unet))
    adapted.attach(pretend_training(spec_of(unet, 1).gaussian(), 1))
    now = predict(adapted)

    def fail_under(weights: Any) -> None:
        with adapted.using(weights):
            raise RuntimeError("stop")

    for weights in ("base", "start", "carry"):
        with pytest.raises(RuntimeError, match="stop"):
            fail_under(weights)
        assert torch.equal(predict(adapted), now)


# ------------------------------------------------------------------------------------ convolutions


class Convolutions(nn.Module):
    """Two convolutions of different strides, named like a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(torch.tanh(self.one(x)))
        assert isinstance(hidden, Tensor)
        return hidden


@pytest.mark.parametrize("carry_as", ["fuse", "branch"])
def test_convolutions_take_adapters_and_deltas(carry_as: str) -> None:
    torch.manual_seed(0)
    net = Convolutions()
    layers = find_layers({"unet": net})
    assert layer_shape(layers["unet.one"]) == (6, 27)
    assert layer_kernel(layers["unet.one"]) == (3, 3)
    spec = AdapterSpec(
        {n: layer_shape(m) for n, m in layers.items()},
        rank=2,
        alpha=4.0,
        seed=1,
        kernels={n: k for n, m in layers.items() if (k := layer_kernel(m)) is not None},
    )
    delta = Delta.of(pretend_training(spec.gaussian(), 1))
    adapter = pretend_training(spec.gaussian(), 2)
    assert adapter["unet.one"].kernel == (3, 3)
    expected = with_delta(net, delta + Delta.of(adapter))
    x = torch.randn(2, 3, 9, 9, generator=seeded(3))
    model = AdaptedUNet({"unet": net})
    model.set_base(delta, carry_as)
    model.attach(adapter)
    with torch.no_grad():
        assert relative(model(x), expected(x)) < 1e-5
    assert model.trained()["unet.one"].kernel == (3, 3)
    model.release()
    assert net.one.weight.shape == (6, 3, 3, 3)


# ------------------------------------------------------------------------------------------ targets


def test_the_toy_base_has_its_eleven_blocks_of_targets(unet: nn.Module) -> None:
    """11 transformer blocks of 8 attention projections and 2 feed-forward ones, 11 x 2 proj."""
    assert len(targets_of(unet, "attention")) == 11 * 8
    assert len(targets_of(unet, "transformer")) == 11 * 10 + 11 * 2


def test_sdxls_topology_has_560_attention_projections_and_722_transformer_layers() -> None:
    from lcp_plugin.sdxl.load import hush_libraries
    from lcp_plugin.tiny import architecture

    hush_libraries()
    with torch.device("meta"):  # names and shapes only: the weights would take seconds
        unet = architecture.build_unet(architecture.TOPO)
    attention, transformer = targets_of(unet, "attention"), targets_of(unet, "transformer")
    assert len(attention) == 560
    assert len(transformer) == 722
    assert set(attention) <= set(transformer)
    endings = {name.rpartition(".attn")[2].partition(".")[2] for name in attention}
    assert endings == {"to_q", "to_k", "to_v", "to_out.0"}


# -------------------------------------------------------------------------------------- wrong bases


def wrong_values(unet: nn.Module) -> Mapping[str, Delta]:
    name = next(iter(targets_of(unet)))
    return {
        "which this base does not have": Delta({"unet.nowhere": Dense(torch.zeros(3, 3))}),
        r"is \(3, 3\), the base's \(": Delta({name: Dense(torch.zeros(3, 3))}),
    }


def test_a_delta_or_adapter_of_another_base_is_an_error(
    adapted: AdaptedUNet, unet: nn.Module
) -> None:
    before = predict(adapted)
    for message, delta in wrong_values(unet).items():
        with pytest.raises(LineageError, match=message):
            adapted.set_base(delta)
        with pytest.raises(LineageError, match=message):
            adapted.set_carry(delta)
        with pytest.raises(LineageError, match=message):
            adapted.attach(delta.as_adapter())
    assert torch.equal(predict(adapted), before)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_joined_layer_has_the_value_and_the_gradients_of_its_parts(
    scale: float, with_bias: bool
) -> None:
    x, weight, bias, down, up = (
        torch.randn(*shape, generator=seeded(n), dtype=torch.float64)
        for n, shape in enumerate(((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)))
    )
    trained = [tensor.requires_grad_() for tensor in (x, down, up)]
    frozen = bias if with_bias else None

    def joined(x: Tensor, down: Tensor, up: Tensor) -> Any:
        return AdaptedLinear.apply(x, weight, frozen, down, up, None, scale)  # type: ignore

    parts = F.linear(x, weight, frozen) + scale * F.linear(F.linear(x, down), up)
    torch.testing.assert_close(joined(*trained), parts)
    assert torch.autograd.gradcheck(joined, trained)
    up.requires_grad_(False)
    joined(*trained).sum().backward()
    assert up.grad is None
    assert down.grad is not None


def test_a_layer_in_training_is_one_node_of_the_graph(adapted: AdaptedUNet, unet: Any) -> None:
    name, layer = next(iter(targets_of(unet).items()))
    adapted.attach(pretend_training(spec_of(unet, 1).gaussian(), 1))
    x = torch.randn(1, 3, layer.in_features, generator=seeded(1))
    plain = layer(x)
    adapted.train()
    joined = layer(x)
    torch.testing.assert_close(joined, plain)
    assert type(joined.grad_fn).__name__ == "AdaptedLinearBackward"
    adapted.pair_of[name].dropout = 0.5
    assert type(layer(x).grad_fn).__name__ != "AdaptedLinearBackward"
