"""Samples of prompt files: their sampler, size and seed hold, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcp_plugin.config.prompts import SamplePrompt
from lcp_plugin.sdxl.prompt_samples import draw_prompt, sample_file_name, texts_of


@pytest.fixture(scope="module")
def pipeline(toy_base: Path) -> Any:
    from lcp_plugin.sdxl.load import load_pipeline

    return load_pipeline(str(toy_base))


def draw(pipeline: Any, **given: Any) -> np.ndarray[Any, Any]:
    from lcp_plugin.sdxl.conditioning import encode_prompts

    prompt = SamplePrompt("a dog", **{"sample_steps": 2, "scale": 2.0, **given})
    pipeline.set_progress_bar_config(disable=True)
    image = draw_prompt(pipeline, prompt, lambda texts: encode_prompts(pipeline, texts), 64)
    return np.asarray(image)


def test_a_prompts_size_holds_cut_to_multiples_of_eight(pipeline: Any) -> None:
    assert draw(pipeline, width=71, height=48).shape == (48, 64, 3)
    assert draw(pipeline).shape == (64, 64, 3)  # the native size


def test_the_same_seed_draws_the_same_and_no_global_state_is_touched(pipeline: Any) -> None:
    state, scheduler = torch.get_rng_state(), pipeline.scheduler
    first, second = draw(pipeline, seed=3), draw(pipeline, seed=3)
    assert (first == second).all()
    assert not (first == draw(pipeline, seed=4)).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler


def test_sampler_steps_guidance_and_negative_prompt_matter(pipeline: Any) -> None:
    plain = draw(pipeline, seed=3)
    for given in (
        {"sample_sampler": "euler"},
        {"sample_steps": 3},
        {"scale": 6.0},
        {"negative_prompt": "ugly"},
    ):
        assert not (draw(pipeline, seed=3, **given) == plain).all(), given


def test_negative_prompts_must_be_encoded_too() -> None:
    prompts = [SamplePrompt("a", "b"), SamplePrompt("c"), SamplePrompt("a")]
    assert texts_of(prompts) == ("a", "b", "c", "")


def test_files_are_named_as_kohya_names_them() -> None:
    assert sample_file_name("dog", 2, None, 100, None, "T") == "dog_000100_02_T.png"
    assert sample_file_name("dog", 0, 7, 100, 1, "T") == "dog_e000001_00_T_7.png"
