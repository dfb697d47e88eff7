"""The shipped base `tiny-sdxl`, and the architectures built from nothing."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_base.world import RESERVED_WORDS

from lcp_plugin.tiny import model_dir
from lcp_plugin.tiny.architecture import TINY, build_pipeline, build_topo, build_toy, save_pipeline
from lcp_plugin.tiny.vocabulary import VOCABULARY_SIZE, byte_alphabet, truncate_vocabulary

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def shipped():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(model_dir())


def test_the_shipped_model_is_at_most_16_megabytes():
    assert sum(file.stat().st_size for file in model_dir().rglob("*")) <= 16_000_000


def test_the_shipped_model_has_sdxls_classes():
    index = json.loads((model_dir() / "model_index.json").read_text())
    wanted = {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    assert {key: index[key] for key in wanted} == wanted
    unet = json.loads((model_dir() / "unet" / "config.json").read_text())
    assert unet["addition_embed_type"] == "text_time"


def test_the_shipped_model_has_the_architecture_that_the_code_builds(shipped):
    built = build_pipeline(TINY)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(built, part).state_dict(), getattr(shipped, part).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# diffusers 0.42 on numpy 2.4
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_shipped_model_samples_its_native_resolution(shipped):
    shipped.set_progress_bar_config(disable=True)
    picture = shipped("a red circle", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (TINY.resolution, TINY.resolution, 3)


def test_every_shipped_weight_is_finite(shipped):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert all(p.isfinite().all() for p in getattr(shipped, part).parameters()), part


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_rare_words_are_told_apart_without_unknown_pieces(shipped, name):
    tokenizer = getattr(shipped, name)
    pieces = {word: tuple(tokenizer(word).input_ids) for word in RESERVED_WORDS}
    assert len(set(pieces.values())) == len(RESERVED_WORDS)
    for ids in pieces.values():
        assert len(ids) > 2
        assert all(index < VOCABULARY_SIZE - 2 for index in ids[1:-1])


def test_common_words_keep_clips_own_ids(shipped):
    # "a photo of a dog" in CLIP: 320 1125 539 320 1929, with start and end of text around it
    assert shipped.tokenizer("a photo of a dog").input_ids[1:-1] == [320, 1125, 539, 320, 1929]


def test_a_truncated_vocabulary_is_bytes_merges_and_two_ends():
    vocabulary, merges = truncate_vocabulary(["i n", "t h", "a n"], 516)
    assert len(set(byte_alphabet())) == 256
    assert merges == ["i n", "t h"]
    assert list(vocabulary)[512:] == ["in", "th", "<|startoftext|>", "<|endoftext|>"]


def test_topo_has_sdxls_560_attention_projections():
    names = [name for name, _ in build_topo().unet.named_modules() if name.endswith(PROJECTIONS)]
    assert len(names) == 560


def test_one_seed_builds_one_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = build_toy(3).unet, build_toy(3).unet, build_toy(4).unet
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.conv_in.weight, second.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_a_saved_pipeline_carries_keys_of_transformers_4_and_comes_back_in_fp32(tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    toy = build_toy()
    wanted = toy.text_encoder.state_dict()["embeddings.token_embedding.weight"].half().float()
    save_pipeline(toy, tmp_path)
    saved = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in saved)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    state = loaded.text_encoder.state_dict()
    assert torch.equal(state["embeddings.token_embedding.weight"], wanted)
