"""Losses and their weights against references written in float64 with numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_values import scaled_linear_betas

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl.loss import LossSettings, LossWeights, apply_masks, compute_loss, image_losses
from lcp_plugin.sdxl.noise import (
    NoiseSchedule,
    alphas_cumprod,
    zero_terminal_betas,
)

SHAPE = (4, 4, 6, 6)
TIMESTEPS = torch.tensor([0, 10, 500, 999])
ALPHAS = alphas_cumprod(scaled_linear_betas())
A = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)[TIMESTEPS.numpy()]
SNR = A / (1 - A)
PREDICTION = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
D: NDArray[np.float64] = PREDICTION.double().numpy() - TARGET.double().numpy()
MSE = (D**2).mean(axis=(1, 2, 3))


def losses(options: Options, prediction_type: str = "epsilon", **more: Any) -> NDArray[np.float64]:
    schedule, settings = NoiseSchedule(ALPHAS, prediction_type), LossSettings.of(options)
    weights = LossWeights.of(more)
    ours = image_losses(PREDICTION, TARGET, TIMESTEPS, schedule, settings, weights)
    return ours.double().numpy()


def test_the_default_is_the_mean_squared_error() -> None:
    np.testing.assert_allclose(losses(Options()), MSE, rtol=1e-5)
    ours = compute_loss(PREDICTION, TARGET, TIMESTEPS, NoiseSchedule(ALPHAS), LossSettings())
    assert ours.item() == pytest.approx(MSE.mean(), rel=1e-5)


def test_l1_is_the_mean_absolute_error() -> None:
    expected = np.abs(D).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(Options(loss_type="l1")), expected, rtol=1e-5)


def thresholds(schedule: str, c: float, scale: float) -> NDArray[np.float64]:
    t = TIMESTEPS.double().numpy()
    if schedule == "constant":
        return np.full(4, c * scale)
    if schedule == "exponential":
        return np.exp(math.log(c) / 1000 * t) * scale
    sigma = np.sqrt((1 - A) / A)
    return ((1 - c) / (1 + sigma) ** 2 + c) * scale


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_huber_family_follows_its_schedule(schedule: str, kind: str, scale: float) -> None:
    c = thresholds(schedule, 0.2, scale).reshape(4, 1, 1, 1)
    per_pixel = 2 * (np.sqrt(D**2 + c**2) - c)
    expected = (c * per_pixel if kind == "huber" else per_pixel).mean(axis=(1, 2, 3))
    options = Options(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=scale)
    np.testing.assert_allclose(losses(options), expected, rtol=2e-4)


WEIGHTS = [
    ({"min_snr_gamma": 5.0}, "epsilon", np.minimum(SNR, 5) / SNR),
    ({"min_snr_gamma": 5.0}, "v_prediction", np.minimum(SNR, 5) / (SNR + 1)),
    ({"debiased_estimation_loss": True}, "epsilon", 1 / np.sqrt(np.minimum(SNR, 1000))),
    ({"debiased_estimation_loss": True}, "v_prediction", 1 / (np.minimum(SNR, 1000) + 1)),
    (
        {"scale_v_pred_loss_like_noise_pred": True},
        "v_prediction",
        np.minimum(SNR, 1000) / (np.minimum(SNR, 1000) + 1),
    ),
    ({"scale_v_pred_loss_like_noise_pred": True}, "epsilon", np.ones(4)),
    (
        {"v_pred_like_loss": 0.3},
        "epsilon",
        1 + 0.3 * (np.minimum(SNR, 1000) + 1) / np.minimum(SNR, 1000),
    ),
]


@pytest.mark.parametrize(("given", "kind", "weights"), WEIGHTS)
def test_losses_are_weighed_by_the_timesteps_snr(
    given: dict[str, Any], kind: str, weights: NDArray[np.float64]
) -> None:
    np.testing.assert_allclose(losses(Options(**given), kind), MSE * weights, rtol=1e-4)


def test_regularisation_images_are_weighed_before_the_snr() -> None:
    prior = torch.tensor([1.0, 0.25, 1.0, 2.0])
    expected = MSE * prior.double().numpy() * np.minimum(SNR, 5) / SNR
    ours = losses(Options(min_snr_gamma=5.0), loss_weights=prior)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_masks_weigh_pixels_after_averaging_down_to_the_latents() -> None:
    masks = torch.rand((4, 1, 48, 48), generator=torch.Generator().manual_seed(3))
    small = masks.double().numpy().reshape(4, 1, 6, 8, 6, 8).mean(axis=(3, 5))
    expected = (D**2 * small).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses(Options(), masks=masks), expected, rtol=1e-5)


def test_a_mask_of_ones_changes_nothing() -> None:
    loss = torch.rand(SHAPE)
    torch.testing.assert_close(apply_masks(loss, torch.ones(4, 1, 48, 48)), loss)


def test_weights_stay_finite_at_zero_terminal_snr() -> None:
    alphas = alphas_cumprod(zero_terminal_betas(scaled_linear_betas()))
    for given in ({"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}):
        for kind in ("epsilon", "v_prediction"):
            schedule, settings = NoiseSchedule(alphas, kind), LossSettings.of(Options(**given))
            ours = image_losses(PREDICTION, TARGET, TIMESTEPS, schedule, settings)
            assert torch.isfinite(ours).all()


def test_half_precision_predictions_are_compared_in_fp32() -> None:
    ours = image_losses(PREDICTION.half(), TARGET, TIMESTEPS, NoiseSchedule(ALPHAS), LossSettings())
    assert ours.dtype == torch.float32
