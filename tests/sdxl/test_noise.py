"""Noise, timesteps and targets against references written in float64 with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_values import scaled_linear_betas

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl.noise import (
    NoiseSettings,
    add_noise,
    add_pyramid,
    alphas_cumprod,
    draw_timesteps,
    make_noise,
    make_target,
    perturb_noise,
    zero_terminal_betas,
)

SHAPE = (3, 4, 8, 8)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=generator(1)) + 0.5


def reference_alphas() -> NDArray[np.float64]:
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return np.cumprod(1 - betas)


def test_the_noise_schedule_is_sdxls() -> None:
    ours = alphas_cumprod(scaled_linear_betas()).numpy()
    np.testing.assert_allclose(ours, reference_alphas(), rtol=1e-12)


def test_zero_terminal_betas_end_in_pure_noise_and_keep_the_first_step() -> None:
    betas = scaled_linear_betas()
    root = np.sqrt(reference_alphas())
    shifted = root - root[-1]
    expected = (shifted * root[0] / shifted[0]) ** 2  # arXiv 2305.08891, algorithm 1
    ours = alphas_cumprod(zero_terminal_betas(betas)).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-15)
    assert ours[-1] == 0.0


def test_noisy_latents_follow_the_forward_process() -> None:
    x, e = latents(), torch.randn(SHAPE, generator=generator(2))
    t = torch.tensor([0, 500, 999])
    a = reference_alphas()[t.numpy()].reshape(3, 1, 1, 1)
    expected = np.sqrt(a) * x.double().numpy() + np.sqrt(1 - a) * e.double().numpy()
    ours = add_noise(x, e, t, alphas_cumprod(scaled_linear_betas()))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_target_of_epsilon_prediction_is_the_noise() -> None:
    e = torch.randn(SHAPE)
    alphas = alphas_cumprod(scaled_linear_betas())
    assert torch.equal(make_target(latents(), e, torch.tensor([1, 2, 3]), alphas, "epsilon"), e)


def test_the_target_of_v_prediction_is_the_velocity() -> None:
    x, e = latents(), torch.randn(SHAPE, generator=generator(2))
    t = torch.tensor([3, 400, 900])
    a = reference_alphas()[t.numpy()].reshape(3, 1, 1, 1)
    expected = np.sqrt(a) * e.double().numpy() - np.sqrt(1 - a) * x.double().numpy()
    alphas = alphas_cumprod(scaled_linear_betas())
    ours = make_target(x, e, t, alphas, "v_prediction")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_plain_noise_is_the_generators() -> None:
    expected = torch.randn(SHAPE, generator=generator())
    assert torch.equal(make_noise(latents(), NoiseSettings.of(Options()), generator()), expected)


def test_noise_offset_shifts_each_channel_by_one_gaussian_number() -> None:
    draws = generator()
    base = torch.randn(SHAPE, generator=draws)
    shift = torch.randn((3, 4, 1, 1), generator=draws)
    ours = make_noise(latents(), NoiseSettings.of(Options(noise_offset=0.1)), generator())
    torch.testing.assert_close(ours, base + 0.1 * shift)


def test_random_strength_scales_the_offset_by_a_number_below_one() -> None:
    draws = generator()
    base = torch.randn(SHAPE, generator=draws)
    strength = torch.rand((), generator=draws) * 0.1
    shift = torch.randn((3, 4, 1, 1), generator=draws)
    options = Options(noise_offset=0.1, noise_offset_random_strength=True)
    torch.testing.assert_close(
        make_noise(latents(), NoiseSettings.of(options), generator()), base + strength * shift
    )


@pytest.mark.parametrize("scale", [0.05, -10.0])
def test_adaptive_noise_scale_adds_the_latents_mean_and_never_goes_below_zero(
    scale: float,
) -> None:
    draws = generator()
    base = torch.randn(SHAPE, generator=draws)
    shift = torch.randn((3, 4, 1, 1), generator=draws)
    mean = np.abs(latents().double().numpy().mean(axis=(2, 3), keepdims=True))
    strength = np.maximum(0.1 + scale * mean, 0)
    options = Options(noise_offset=0.1, adaptive_noise_scale=scale)
    ours = make_noise(latents(), NoiseSettings.of(options), generator())
    expected = base.double().numpy() + strength * shift.double().numpy()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_pyramid_noise_has_unit_variance_and_coarse_correlation() -> None:
    plain = torch.randn((64, 4, 16, 16), generator=generator())
    ours = add_pyramid(plain, 6, 0.8, generator(3))
    assert ours.std().item() == pytest.approx(1.0, abs=1e-5)

    def neighbours(noise: torch.Tensor) -> float:
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    assert abs(neighbours(plain)) < 0.02
    assert neighbours(ours) > 0.1


def test_pyramid_noise_without_weight_is_the_noise_rescaled() -> None:
    plain = torch.randn(SHAPE, generator=generator())
    draws = generator(3)
    torch.rand((), generator=draws)
    first = torch.randn(SHAPE, generator=draws)  # layer 0 has full size and weight discount^0 = 1
    expected = plain + first
    torch.testing.assert_close(add_pyramid(plain, 4, 0.0, generator(3)), expected / expected.std())


def test_input_perturbation_adds_noise_that_is_not_the_target() -> None:
    e = torch.randn(SHAPE, generator=generator(2))
    extra = torch.randn(SHAPE, generator=generator())
    ours = perturb_noise(e, NoiseSettings.of(Options(ip_noise_gamma=0.1)), generator())
    torch.testing.assert_close(ours, e + 0.1 * extra)
    assert perturb_noise(e, NoiseSettings.of(Options()), generator()) is e


def test_random_strength_of_input_perturbation_stays_below_gamma() -> None:
    e = torch.zeros(SHAPE)
    options = Options(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    draws = generator()
    strength = torch.rand((), generator=draws) * 0.1
    expected = strength * torch.randn(SHAPE, generator=draws)
    torch.testing.assert_close(perturb_noise(e, NoiseSettings.of(options), generator()), expected)


def test_timesteps_stay_within_their_limits() -> None:
    options = Options(min_timestep=200, max_timestep=210)
    t = draw_timesteps(2000, NoiseSettings.of(options), 1000, generator())
    assert set(t.tolist()) == set(range(200, 210))  # the upper limit is exclusive


def test_equal_limits_give_one_timestep() -> None:
    options = Options(min_timestep=300, max_timestep=300)
    assert draw_timesteps(3, NoiseSettings.of(options), 1000, generator()).tolist() == [300] * 3


def test_timesteps_cover_the_whole_range_by_default() -> None:
    t = draw_timesteps(20000, NoiseSettings.of(Options()), 1000, generator())
    assert t.min() == 0
    assert t.max() == 999
