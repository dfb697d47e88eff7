"""Samplers by kohya's names, against a noise oracle whose answer is known."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from lcp_plugin.config.options import option_fields
from lcp_plugin.config.samplers import SAMPLERS
from lcp_plugin.errors import ConfigError
from lcp_plugin.sdxl.samplers import create_sampler

SCIPY = importlib.util.find_spec("scipy") is not None
BASE = EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)
TARGET = torch.full((1, 4, 4, 4), 0.5)


def test_the_names_are_those_of_the_option() -> None:
    assert set(SAMPLERS) == set(option_fields()["sample_sampler"].metadata["choices"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers'
@pytest.mark.parametrize("name", [n for n in SAMPLERS if SCIPY or "lms" not in n])
def test_a_sampler_finds_what_the_noise_oracle_hides(name: str) -> None:
    sampler = create_sampler(name, BASE)
    sampler.set_timesteps(20)
    assert sampler.config.beta_start == 0.00085
    sample = torch.randn(TARGET.shape, generator=torch.Generator().manual_seed(0))
    sample = sample * sampler.init_noise_sigma
    for t in sampler.timesteps:
        alpha = torch.as_tensor(sampler.alphas_cumprod[int(t)])
        scaled = sampler.scale_model_input(sample, t)
        noise = (scaled - alpha.sqrt() * TARGET) / (1 - alpha).sqrt()
        sample = sampler.step(noise, t, sample).prev_sample
    # some samplers stop at the first timestep, where noise of sqrt(1 - a_0) = .03 is left
    assert (sample - TARGET).abs().max() < 0.15


@pytest.mark.skipif(SCIPY, reason="scipy is there")
def test_lms_without_scipy_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="scipy"):
        create_sampler("lms", BASE)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_zero_terminal_snr_starts_at_the_last_timestep(name: str) -> None:
    sampler = create_sampler(name, BASE, "v_prediction", zero_terminal_snr=True)
    sampler.set_timesteps(4)
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    assert sampler.config.prediction_type == "v_prediction"
    assert float(sampler.alphas_cumprod[-1]) < 1e-6


@pytest.mark.parametrize("name", ["pndm", "heun", "dpmsingle"])
def test_samplers_that_cannot_start_from_pure_noise_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot start from pure noise"):
        create_sampler(name, BASE, zero_terminal_snr=True)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted one of ddim"):
        create_sampler("dimm", BASE)
