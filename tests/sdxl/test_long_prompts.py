"""Long and weighted prompts: pieces, their joints, and plain prompts as diffusers encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcp_plugin.sdxl.long_prompts import encode_long_prompts, join_pieces, tokenize


@pytest.fixture(scope="module")
def pipeline(toy_base: Path) -> Any:
    from lcp_plugin.sdxl.load import load_pipeline

    loaded = load_pipeline(str(toy_base))
    for encoder in (loaded.text_encoder, loaded.text_encoder_2):
        encoder.requires_grad_(False)
    return loaded


def words(count: int) -> str:
    return " ".join(["a"] * count)


def test_a_plain_prompt_is_encoded_as_diffusers_does(pipeline: Any) -> None:
    from lcp_plugin.sdxl.conditioning import encode_prompts

    prompts = ["a photo of a dog", ""]
    ours = encode_long_prompts(pipeline, prompts, None, weighted=False)
    theirs = encode_prompts(pipeline, prompts)
    for key in ("encoder_hidden_states", "text_embeds"):
        torch.testing.assert_close(ours[key], theirs[key].cpu())


@pytest.mark.parametrize(("limit", "states"), [(None, 77), (75, 77), (150, 152), (225, 227)])
def test_longer_prompts_have_more_states(pipeline: Any, limit: int | None, states: int) -> None:
    ours = encode_long_prompts(pipeline, [words(100)], limit, weighted=False)
    assert ours["encoder_hidden_states"].shape[:2] == (1, states)
    assert ours["text_embeds"].shape[0] == 1


def test_a_long_prompts_tokens_fill_the_pieces_in_turn(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    tokens = tokenize(tokenizer, words(100), 150, weighted=False)
    (a,) = tokenizer("a", add_special_tokens=False).input_ids
    assert tokens.ids.shape == (2, 77)
    assert tokens.ids[0].tolist() == [tokenizer.bos_token_id, *[a] * 75, tokenizer.eos_token_id]
    assert tokens.ids[1, 1:26].tolist() == [a] * 25
    assert tokens.ids[1, 26] == tokenizer.eos_token_id
    cut = tokenize(tokenizer, words(100), 75, weighted=False)
    assert cut.ids.tolist() == tokens.ids[:1].tolist()


def test_weights_stand_at_their_tokens(pipeline: Any) -> None:
    tokens = tokenize(pipeline.tokenizer, "a (a:1.5) a", 75, weighted=True)
    assert tokens.weights[0, :5].tolist() == [1.0, 1.0, 1.5, 1.0, 1.0]
    plain = tokenize(pipeline.tokenizer, "a a a", 75, weighted=False)
    assert torch.equal(tokens.ids, plain.ids)


def test_a_weight_multiplies_its_tokens_state(pipeline: Any) -> None:
    plain = encode_long_prompts(pipeline, ["a a a"], None, weighted=False)
    heavy = encode_long_prompts(pipeline, ["a (a:1.5) a"], None, weighted=True)
    expected = plain["encoder_hidden_states"].clone()
    expected[:, 2] *= 1.5
    torch.testing.assert_close(heavy["encoder_hidden_states"], expected)
    torch.testing.assert_close(heavy["text_embeds"], plain["text_embeds"])


def test_pieces_are_joined_between_the_first_start_and_the_last_end() -> None:
    states = torch.arange(2 * 77.0).view(1, 2, 77, 1)
    joined = join_pieces(states)[0, :, 0].tolist()
    assert joined == [0, *range(1, 76), *range(78, 153), 153]


def test_gradients_reach_text_encoders_that_are_trained(pipeline: Any) -> None:
    weight = pipeline.text_encoder_2.text_model.encoder.layers[0].mlp.fc1.weight
    weight.requires_grad_(True)
    encoded = encode_long_prompts(pipeline, ["a dog"], None, weighted=False)
    encoded["encoder_hidden_states"].sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    weight.requires_grad_(False)
    weight.grad = None
