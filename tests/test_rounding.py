"""Stochastic rounding of W_0 + D: right in the mean, the same everywhere, nothing for D = 0."""

from __future__ import annotations

import math

import pytest
import torch
from toy_values import seeded

from lcp_plugin.delta import Dense
from lcp_plugin.sdxl.rounding import measure_fuse, round_stochastically

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_of_the_type_stay_themselves(dtype: torch.dtype) -> None:
    values = torch.randn(64, 64, generator=seeded(0)).to(dtype).float()
    values[0, :4] = torch.tensor([0.0, math.inf, -math.inf, 2.0**-20])
    assert torch.equal(round_stochastically(values, dtype, "a").float(), values)
    assert round_stochastically(torch.tensor([math.nan]), dtype, "a").isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.3, -1.7, 3e-6])
def test_a_value_between_two_numbers_is_right_in_the_mean(dtype: torch.dtype, value: float) -> None:
    values = torch.full((400, 400), value)
    rounded = round_stochastically(values, dtype, "b").double()
    lower, upper = rounded.unique().tolist()  # both neighbours, and no other
    exact = float(torch.tensor(value))
    assert lower < exact < upper
    share = (exact - lower) / (upper - lower)
    spread = (upper - lower) * math.sqrt(share * (1 - share) / values.numel())
    assert abs(float(rounded.mean()) - exact) < 5 * spread


def test_the_same_module_is_rounded_alike_and_another_otherwise() -> None:
    values = torch.rand(50, 50, generator=seeded(1))
    first = round_stochastically(values, torch.bfloat16, "unet.a")
    assert torch.equal(first, round_stochastically(values.clone(), torch.bfloat16, "unet.a"))
    assert not torch.equal(first, round_stochastically(values, torch.bfloat16, "unet.b"))


def test_a_small_update_arrives_where_the_nearest_number_swallows_it() -> None:
    weight = (torch.randn(200, 300, generator=seeded(2)) * 0.03).bfloat16().float()
    entry = Dense(torch.randn(200, 300, generator=seeded(3)) * 1e-5)
    total = weight + entry.weight
    nearest = measure_fuse(weight, entry, total.bfloat16())
    fused = measure_fuse(weight, entry, round_stochastically(total, torch.bfloat16, "c"))
    assert nearest.shares()["missing_share"] > 0.5
    # 5 standard deviations of the projection on D, each error at most half a step of 2^-8 |W|
    noise = 5 * float((entry.weight * weight * 2.0**-8 / 2).norm()) / entry.norm() ** 2
    assert fused.shares()["missing_share"] < noise
    assert fused.shares()["noise_share"] < 2.0**-8


def test_fp32_is_not_rounded() -> None:
    values = torch.randn(5, 5, generator=seeded(4))
    assert torch.equal(round_stochastically(values, torch.float32, "d"), values)
