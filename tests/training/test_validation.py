"""Loss on held-out images: fixed timesteps and noise, so that numbers can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_values import scaled_linear_betas

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl.loss import LossSettings
from lcp_plugin.sdxl.noise import (
    NoiseSchedule,
    NoiseSettings,
    alphas_cumprod,
)
from lcp_plugin.training.validation import measure_loss, validation_timesteps

ALPHAS = alphas_cumprod(scaled_linear_betas())
BATCHES = [
    {"latents": torch.randn((n, 4, 8, 8), generator=torch.Generator().manual_seed(n))}
    for n in (2, 1)
]


def measure(predict: Any, options: Options | None = None, seed: int = 0) -> float:
    settings = LossSettings.of(options or Options())
    return measure_loss(predict, BATCHES, NoiseSettings(), settings, NoiseSchedule(ALPHAS), seed)


def test_timesteps_are_spread_inside_the_range_of_training() -> None:
    assert validation_timesteps(NoiseSettings.of(Options())) == (200, 400, 600, 800)
    assert validation_timesteps(NoiseSettings.of(Options(min_timestep=500, max_timestep=1000))) == (
        600,
        700,
        800,
        900,
    )


def test_a_perfect_prediction_has_no_loss() -> None:
    known = {id(b["latents"]): b["latents"] for b in BATCHES}

    def oracle(noisy: Tensor, steps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        a = ALPHAS[steps].float().view(-1, 1, 1, 1)
        return (noisy - a.sqrt() * known[id(batch["latents"])]) / (1 - a).sqrt()

    assert measure(oracle) == pytest.approx(0.0, abs=1e-9)


def test_predicting_nothing_costs_the_noises_variance() -> None:
    # 3 images x 4 timesteps x 256 values of unit variance: standard error sqrt(2 / 3072)
    loss = measure(lambda noisy, steps, batch: torch.zeros_like(noisy))
    assert loss == pytest.approx(1.0, abs=4 * math.sqrt(2 / 3072))


def test_the_number_repeats_and_does_not_touch_global_random_numbers() -> None:
    state = torch.get_rng_state()
    zero = lambda noisy, steps, batch: torch.zeros_like(noisy)  # noqa: E731
    assert measure(zero) == measure(zero)
    assert measure(zero) != measure(zero, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_snr_weights_do_not_enter() -> None:
    zero = lambda noisy, steps, batch: torch.zeros_like(noisy)  # noqa: E731
    assert measure(zero, Options(min_snr_gamma=1.0)) == measure(zero)
    assert measure(zero, Options(loss_type="l1")) != measure(zero)


def test_without_images_there_is_no_number() -> None:
    assert math.isnan(
        measure_loss(torch.add, [], NoiseSettings(), LossSettings(), NoiseSchedule(ALPHAS), 0)
    )
