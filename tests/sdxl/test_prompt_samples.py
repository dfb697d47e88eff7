"""Samples of prompt files: their sampler, size and seed hold, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcp_plugin.config.prompts import SamplePrompt
from lcp_plugin.sdxl.prompt_samples import draw_prompt, sample_file_name


@pytest.fixture(scope="module")
def base(toy_base: Path) -> Any:
    from lcp_plugin.config.options import Options
    from lcp_plugin.sdxl.live_base import build_live_base
    from lcp_plugin.sdxl.load import load_pipeline

    return build_live_base(Options(), load_pipeline(str(toy_base)), torch.device("cpu"))


def draw(base: Any, **given: Any) -> np.ndarray[Any, Any]:
    prompt = SamplePrompt("a dog", **{"sample_steps": 2, "scale": 2.0, **given})
    return np.asarray(draw_prompt(base, prompt))


def test_a_prompts_size_holds_cut_to_multiples_of_eight(base: Any) -> None:
    assert draw(base, width=71, height=48).shape == (48, 64, 3)
    assert draw(base).shape == (32, 32, 3)  # the native size


def test_the_same_seed_draws_the_same_and_no_global_state_is_touched(base: Any) -> None:
    state, scheduler = torch.get_rng_state(), base.pipeline.scheduler
    first, second = draw(base, seed=3), draw(base, seed=3)
    assert (first == second).all()
    assert not (first == draw(base, seed=4)).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert base.pipeline.scheduler is scheduler


def test_sampler_steps_guidance_and_negative_prompt_matter(base: Any) -> None:
    plain = draw(base, seed=3)
    for given in (
        {"sample_sampler": "euler"},
        {"sample_steps": 3},
        {"scale": 6.0},
        {"negative_prompt": "ugly"},
    ):
        assert not (draw(base, seed=3, **given) == plain).all(), given


def test_files_are_named_as_kohya_names_them() -> None:
    assert sample_file_name("dog", 2, None, 100, None, "T") == "dog_000100_02_T.png"
    assert sample_file_name("dog", 0, 7, 100, 1, "T") == "dog_e000001_00_T_7.png"
