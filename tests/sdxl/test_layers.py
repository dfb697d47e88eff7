"""LoRA and deltas on a live UNet: what it predicts, and that the base comes back to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_strategies import VARIANTS, make
from torch import Tensor, nn
from toy_values import make_task, pretend_training, seeded

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.errors import LineageError
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.sdxl.adapted_linear import AdaptedLinear
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.sdxl.layers import choose_targets, find_layers, layer_kernel, layer_shape
from lcp_plugin.sdxl.live import run_unet
from lcp_plugin.sdxl.rounding import add_delta, rounding_loss
from lcp_plugin.sdxl.sites import Site

CARRIES = ("fuse", "branch", "auto")


@pytest.fixture(scope="module")
def toy_unet() -> nn.Module:
    """The toy base's UNet in fp32: never changed, tests adapt copies."""
    from lcp_plugin.sdxl.load import hush_libraries
    from lcp_plugin.tiny.architecture import build_toy

    hush_libraries()
    unet: nn.Module = build_toy().unet
    return unet.requires_grad_(False)


@pytest.fixture
def unet(toy_unet: nn.Module) -> nn.Module:
    return copy.deepcopy(toy_unet)


@pytest.fixture
def adapted(unet: nn.Module) -> Iterator[AdaptedUNet]:
    model = AdaptedUNet({"unet": unet})
    yield model
    model.release()


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


# ------------------------------------------------------------------------------------------- law 3


@pytest.mark.parametrize("carry_as", CARRIES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if make(v).starts_from_parent])
def test_step_zero_of_a_chained_task_predicts_what_the_parent_predicted(
    unet: nn.Module, variant: str, carry_as: str
) -> None:
    strategy = make(variant)
    carry = learn_on(unet, strategy, 2)
    expected = predict(with_delta(unet, carry.total))
    assert relative(predict(unet), expected) > 1e-2  # the delta shows
    start = strategy.begin_task(make_task(3), carry, spec_of(unet, 3))
    model = AdaptedUNet({"unet": unet})
    model.set_base(start.base, carry_as)
    model.attach(start.adapter, start.trainable)
    assert relative(predict(model), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("carry_as", CARRIES)
def test_half_precision_predicts_the_parent_within_its_own_rounding(
    unet: nn.Module, dtype: torch.dtype, carry_as: str
) -> None:
    strategy = make("merge_init")
    half = copy.deepcopy(unet).to(dtype)
    exact = copy.deepcopy(half).float()  # the same weights, computed in fp32
    carry = learn_on(exact, strategy, 2)
    expected = predict(with_delta(exact, carry.total))
    rounded = with_delta(exact, carry.total).to(dtype)
    own_rounding = relative(predict(rounded, dtype), expected)
    start = strategy.begin_task(make_task(3), carry, spec_of(half, 3))
    model = AdaptedUNet({"unet": half})
    model.set_base(start.base, carry_as)
    model.attach(start.adapter)
    assert relative(predict(model, dtype), expected) < 2 * own_rounding


def test_fused_and_branched_deltas_predict_alike(adapted: AdaptedUNet, unet: nn.Module) -> None:
    delta = small_delta(unet)
    expected = predict(with_delta(unet, delta))
    facts = adapted.set_base(delta, "fuse")
    assert (facts["fused"], facts["branched"]) == (len(delta), 0)
    assert relative(predict(adapted), expected) < 1e-5
    facts = adapted.set_base(delta, "branch")
    assert (facts["fused"], facts["branched"]) == (0, len(delta))
    assert facts["rounding_share"] == 0
    assert relative(predict(adapted), expected) < 1e-5


def test_auto_fuses_on_every_base(unet: nn.Module) -> None:
    delta = small_delta(unet)
    half = copy.deepcopy(unet).to(torch.bfloat16)
    mixed = Delta({n: Dense(e.dense()) if "to_q" in n else e for n, e in delta.items()})
    assert {type(e) for e in mixed.values()} == {Dense, Stacked}
    assert AdaptedUNet({"unet": unet}).set_base(mixed)["fused"] == len(mixed)
    facts = AdaptedUNet({"unet": half}).set_base(mixed)
    assert facts["fused"] == len(mixed)
    assert facts["missing_share"] < 0.02  # what nearest rounding takes is most of it


@pytest.mark.parametrize("form", ["dense", "stacked"])
def test_a_branch_loses_only_its_own_rounding(unet: nn.Module, form: str) -> None:
    half = unet.to(torch.bfloat16)
    delta = small_delta(unet, size=1e-4)
    kept = {}
    for name, entry in delta.items():
        if form == "dense":
            delta = Delta({**delta, name: Dense(entry.dense())})
            kept[name] = entry.dense().bfloat16().double()
        else:
            assert isinstance(entry, Stacked)
            kept[name] = entry.up.bfloat16().double() @ entry.down.bfloat16().double()
    facts = AdaptedUNet({"unet": half}).set_base(delta, "branch")
    lost = sum(float((kept[n] - e.dense().double()).square().sum()) for n, e in delta.items())
    assert facts["rounding_share"] == pytest.approx(math.sqrt(lost) / delta.norm(), rel=1e-3)
    assert facts["rounding_share"] < 0.01


# --------------------------------------------------------------------------------- law 5, restoring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_comes_back_to_the_bit_where_subtracting_would_not(
    unet: nn.Module, dtype: torch.dtype
) -> None:
    unet = unet.to(dtype)
    before = weights_of(unet)
    delta = small_delta(unet)
    model = AdaptedUNet({"unet": unet})
    model.set_base(delta, "fuse")
    fused = weights_of(unet)
    changed = [n for n in before if not torch.equal(before[n], fused[n])]
    assert len(changed) == len(delta)
    subtracted = [
        (fused[n].float() - delta[f"unet.{n.removesuffix('.weight')}"].dense()).to(dtype)
        for n in changed
    ]
    assert not all(torch.equal(s, before[n]) for s, n in zip(subtracted, changed, strict=True))
    model.release()
    after = weights_of(unet)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_second_base_is_added_to_untouched_weights_not_to_the_first(unet: nn.Module) -> None:
    first, second = small_delta(unet, 1), small_delta(unet, 2)
    model = AdaptedUNet({"unet": unet})
    for _ in range(3):
        model.set_base(first, "fuse")
        model.set_base(second, "fuse")
    many = weights_of(unet)
    model.release()
    model.set_base(second, "fuse")
    once = weights_of(unet)
    assert all(torch.equal(many[n], once[n]) for n in many)


def test_one_layer_fused_twice_holds_the_second_delta_only() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    before = layer.weight.detach().clone()
    site = Site("unet.x", layer)
    for scale in (1e3, 1.0):
        entry = Dense(scale * torch.randn(4, 5, generator=seeded(1)))
        site.fuse(entry, measure=False)
    assert torch.equal(layer.weight.detach(), before + entry.dense())
    site.remove()
    assert torch.equal(layer.weight.detach(), before)


def test_modules_of_an_earlier_base_return_when_the_next_does_not_change_them(
    adapted: AdaptedUNet, unet: nn.Module
) -> None:
    before = predict(unet)
    delta = small_delta(unet)
    for carry_as in ("fuse", "branch"):
        adapted.set_base(delta, carry_as)
        adapted.set_base(Delta(), carry_as)
        assert torch.equal(predict(adapted), before)


def test_release_leaves_no_hook_no_parameter_and_no_difference(unet: nn.Module) -> None:
    before, keys = predict(unet), set(unet.state_dict())
    model = AdaptedUNet({"unet": unet})
    model.set_base(small_delta(unet))
    model.attach(pretend_training(spec_of(unet, 1).gaussian(), 1))
    model.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert set(unet.state_dict()) == keys
    assert torch.equal(predict(unet), before)
    assert len(list(model.pairs.parameters())) == 0


def test_attached_factors_never_enter_the_unets_own_state(unet: nn.Module) -> None:
    keys = set(unet.state_dict())
    model = AdaptedUNet({"unet": unet})
    model.attach(spec_of(unet, 1).gaussian())
    assert set(unet.state_dict()) == keys
    model.release()


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


# ----------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["stacked", "dense"])
def test_the_rounding_share_is_what_float64_says(
    unet: nn.Module, dtype: torch.dtype, form: str
) -> None:
    unet = unet.to(dtype)
    delta = small_delta(unet, size=1e-4)
    if form == "dense":
        delta = Delta({n: Dense(e.dense()) for n, e in delta.items()})
    untouched = {n: layer.weight.detach().clone() for n, layer in targets_of(unet).items()}
    facts = AdaptedUNet({"unet": unet}).set_base(delta, "fuse")
    lost = size = 0.0
    for name, layer in targets_of(unet).items():
        update = delta[name].dense().double()
        error = layer.weight.double() - untouched[name].double() - update
        lost, size = lost + float(error.square().sum()), size + float(update.square().sum())
    assert facts["rounding_share"] == pytest.approx(math.sqrt(lost / size), rel=1e-3)
    assert facts["rounding_share"] > 0.05  # small updates drown in half precision


def test_the_rounding_share_of_fp32_is_measured_below_its_own_precision() -> None:
    weight = torch.randn(20, 30, generator=seeded(1))
    entry = Dense(1e-3 * torch.randn(20, 30, generator=seeded(2)))
    rounded = add_delta(weight, entry)
    lost, size = rounding_loss(weight, entry, rounded)
    update = entry.weight.double()
    expected = float((rounded.double() - weight.double() - update).square().sum())
    assert lost == pytest.approx(expected, rel=1e-6)
    assert size == pytest.approx(float(update.square().sum()), rel=1e-9)
    assert 0 < lost < 1e-6 * size


def test_add_delta_changes_neither_argument() -> None:
    weight = torch.randn(8, 9, generator=seeded(1))
    entry = Stacked(torch.randn(8, 2), torch.randn(2, 9), (2,))
    before = weight.clone(), entry.up.clone(), entry.down.clone()
    add_delta(weight, entry)
    now = (weight, entry.up, entry.down)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


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


def test_a_strategys_base_delta_is_the_frozen_one(adapted: AdaptedUNet, unet: nn.Module) -> None:
    delta = small_delta(unet)
    adapted.set_base(delta, "fuse")
    for name, entry in delta.items():
        got = adapted.base_delta(name)
        assert got is not None
        assert torch.equal(got, entry.dense())
    assert adapted.base_delta("unet.conv_in") is None


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
