"""Deltas on a live UNet: the parent's predictions, and the base comes back to the bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from strategy_variants import VARIANTS, make
from torch import nn
from toy_unets import (
    learn_on,
    predict,
    relative,
    small_delta,
    spec_of,
    targets_of,
    weights_of,
    with_delta,
)
from toy_values import make_task, pretend_training, seeded

from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.sdxl.rounding import add_delta, rounding_loss
from lcp_plugin.sdxl.sites import Site

CARRIES = ("fuse", "branch", "auto")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_was_set_before_leaves_nothing_behind(unet: nn.Module, dtype: torch.dtype) -> None:
    half = copy.deepcopy(unet).to(dtype)
    before = {name: weight.clone() for name, weight in weights_of(half).items()}
    first, second = small_delta(half, 1), small_delta(half, 2)
    few = first.restrict(list(first)[::3])
    model = AdaptedUNet({"unet": half})
    ways = [(first, "fuse"), (few, "branch"), (Delta(), "fuse"), (few, "fuse"), (second, "branch")]
    for delta, way in [*ways, (first, "fuse"), (few, "fuse")]:
        model.set_base(delta, way)
    changed = {name for name, w in weights_of(half).items() if not torch.equal(w, before[name])}
    assert {f"unet.{name.removesuffix('.weight')}" for name in changed} == set(few)
    left = weights_of(half)
    model.release()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(half).items())
    model.set_base(few, "fuse")
    assert all(torch.equal(weight, left[name]) for name, weight in weights_of(half).items())


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


def test_a_strategys_base_delta_is_the_frozen_one(adapted: AdaptedUNet, unet: nn.Module) -> None:
    delta = small_delta(unet)
    adapted.set_base(delta, "fuse")
    for name, entry in delta.items():
        got = adapted.base_delta(name)
        assert got is not None
        assert torch.equal(got, entry.dense())
    assert adapted.base_delta("unet.conv_in") is None
