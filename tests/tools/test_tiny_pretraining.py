"""The pretraining's parts on a toy: resuming, whitening, orthogonal updates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_base import muon, precision
from tiny_base.muon import orthogonalise
from tiny_base.pretrain_unet import (
    WORD_COSINE,
    WORDS_COMPARED,
    train_unet,
    word_loss,
    zero_outputs,
)
from tiny_base.pretrain_vae import to_tensor, train_vae, whiten_latents
from tiny_base.render import draw_scene
from tiny_base.schedule import Budget, Stage, learning_rate_share
from tiny_base.stages import load_start
from tiny_base.world import Scene, sample_scene

from lcp_plugin.errors import DataError
from lcp_plugin.tiny.architecture import (
    SCALING_FACTOR,
    TINY,
    TOY,
    build_pipeline,
    build_toy,
    save_pipeline,
)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def shapes() -> list[Scene]:
    rng, found = np.random.default_rng(0), []
    while len(found) < 64:
        scene = sample_scene(rng)
        if scene.is_shape:
            found.append(scene)
    return found


@pytest.fixture(scope="module")
def pictures(shapes):
    return np.stack([draw_scene(scene, None, TOY.resolution) for scene in shapes])


def _kill_at(step):
    def report(_, facts):
        if facts["steps"] == step:
            raise Killed

    return report


def test_a_killed_autoencoder_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, pictures):
    whole, broken = build_toy().vae, build_toy().vae
    train_vae(whole, pictures, Stage(tmp_path / "whole.safetensors", Budget(steps=4), 1))
    stage = Stage(tmp_path / "broken.safetensors", Budget(steps=4), 1, 0, _kill_at(2))
    with pytest.raises(Killed):
        train_vae(broken, pictures, stage)
    again = build_toy(seed=9).vae
    facts = train_vae(again, pictures, Stage(stage.checkpoint, Budget(steps=4), 1))
    assert facts["steps"] == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_killed_unet_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, shapes):
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    file = tmp_path / "broken.safetensors"

    def train(pipeline, checkpoint, **options):
        zero_outputs(pipeline.unet)
        train_unet(pipeline, latents, shapes, Stage(checkpoint, Budget(steps=4), 1, **options))
        return {**pipeline.unet.state_dict(), **pipeline.text_encoder_2.state_dict()}

    whole = train(build_toy(), tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        train(build_toy(), file, save_every=0, report=_kill_at(3))
    again = train(build_toy(seed=9), file)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_training_goes_on_from_an_exported_models_weights(tmp_path):
    exported = build_toy(seed=3)
    save_pipeline(exported, tmp_path / "model")
    fresh = build_toy(seed=9)
    load_start(fresh, tmp_path / "model")
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        shipped = getattr(exported, part).state_dict()
        for name, tensor in getattr(fresh, part).state_dict().items():
            assert torch.equal(tensor, shipped[name].half().float()), name


def test_a_model_of_another_size_is_refused_in_one_line(tmp_path):
    save_pipeline(build_toy(), tmp_path / "model")
    with pytest.raises(DataError, match="its vae has other sizes") as caught:
        load_start(build_pipeline(TINY), tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_word_loss_is_the_mean_square_of_what_cosines_exceed(monkeypatch, dtype):
    pipeline, seen = build_toy(), []
    monkeypatch.setattr(precision, "fast_dtype", lambda: dtype)
    encoder = pipeline.text_encoder_2
    encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].detach()))
    loss = float(word_loss(pipeline, np.random.default_rng(0)).detach())
    units = [row / row.norm() for row in seen[0].double()]
    cosines = [float(one @ other) for one, other in itertools.combinations(units, 2)]
    assert len(cosines) == WORDS_COMPARED * (WORDS_COMPARED - 1) / 2
    wanted = np.mean([max(cosine - WORD_COSINE, 0) ** 2 for cosine in cosines])
    assert loss == pytest.approx(wanted, rel=1e-4)  # fp32 from the pooled states on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_word_loss_brings_rare_words_of_one_class_apart(monkeypatch, dtype, seed):
    pipeline = build_toy(seed=seed)
    monkeypatch.setattr(precision, "fast_dtype", lambda: dtype)
    optimiser = torch.optim.Adam(pipeline.text_encoder_2.parameters(), lr=0.001)
    losses = []
    for _ in range(16):
        loss = word_loss(pipeline, np.random.default_rng(seed))  # the same words at each step
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.1
    assert losses[-1] < losses[0] / 4  # a hundredth or less, on three seeds and in both precisions


def test_whitening_keeps_reconstructions_and_makes_latents_white(pictures):
    vae = build_toy().vae
    with torch.no_grad():
        before = vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mode()).sample
        whiten_latents(vae, pictures, SCALING_FACTOR)
        latents = vae.encode(to_tensor(pictures)).latent_dist.mode()
        after = vae.decode(latents).sample
    flat = (latents * SCALING_FACTOR).permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(torch.cov(flat), torch.eye(4), atol=0.02)


def test_whitened_latents_are_the_same_whether_sampled_or_not(pictures):
    vae = build_toy().vae
    whiten_latents(vae, pictures, SCALING_FACTOR)
    with torch.no_grad():
        distribution = vae.encode(to_tensor(pictures[:2])).latent_dist
    assert torch.allclose(distribution.sample(), distribution.mode(), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_muon_brings_all_singular_values_near_one(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(update).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.parametrize("shape", [(3, 8, 72), (2, 72, 8)])
def test_wide_matrices_go_through_their_gram_matrix_to_the_same_update(monkeypatch, shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update[0] *= torch.logspace(0, -3, shape[-1])  # badly conditioned
    monkeypatch.setattr(muon, "fast_dtype", lambda: torch.float32)
    by_gram = muon.orthogonalise(update)
    monkeypatch.setattr(muon, "WIDE", 1_000)
    assert not torch.equal(by_gram, muon.orthogonalise(update))  # another way was taken
    torch.testing.assert_close(by_gram, muon.orthogonalise(update), atol=1e-4, rtol=0)


def test_learning_rate_rises_stays_and_falls_to_zero():
    def share(progress, step):
        return learning_rate_share(progress, step, warmup=10, decay_from=0.5)

    assert share(0.0, 0) == pytest.approx(0.1)
    assert share(0.4, 50) == 1
    assert share(0.75, 80) == pytest.approx(0.5)
    assert share(1.0, 100) == 0
