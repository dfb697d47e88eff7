"""Pretraining, second part: UNet and both text encoders together, on encoded scenes.

v-prediction (arXiv 2202.00512) on SDXL's noise schedule: with a = alpha_bar(t),
x_t = sqrt(a) z + sqrt(1 - a) e and the target v = sqrt(a) e - sqrt(1 - a) z, squared error,
timesteps uniform. From the middle of the training on, half of the scenes with a rare word or from
the second emoji set give way to plain ones, and half of the timesteps come from a logit-normal
distribution about the middle (arXiv 2403.03206), where outlines are decided. Outputs of residual
branches start at zero. A tenth of the captions is dropped,
half of them to the empty text and half to zeros, because pipelines use either for guidance.
The size numbers of SDXL's conditioning are random half of the time, so that they mean nothing:
images of any original size and crop are the same to the base.

The pooled state reaches the UNet as one bias and learns little beside the attended states; a second
loss keeps it from giving two rare words of one class the same state (see word_loss).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiny_base.muon import MuonAdamW
from tiny_base.precision import fast_autocast
from tiny_base.schedule import Stage, learning_rate_share
from tiny_base.world import EMOJI, SETS, Scene, describe_scene, random_word

LEARNING_RATES = (5e-3, 2e-3)  # Muon, AdamW
AVERAGE_DECAY = 0.996
BATCH = 32
DROPPED = 0.1  # share of captions
WARMUP = 100  # steps
DECAY_FROM = 0.55  # progress from which the learning rate falls
DECAY_FROM_TRAINED = 0.3  # the same, where the weights were trained before
FOCUS_FROM = 0.48  # progress from which plain scenes and middle timesteps are preferred
FOCUS = 0.5  # share of special scenes replaced, and of timesteps from the middle
MIDDLE = (0.5, 0.9)  # mean and deviation of the logit of t / 1000
WORD_COSINE = 0.5  # above it two rare words of one class are too alike in the pooled state
WORDS_COMPARED = 6
ADAMW_ONLY = ("token_embedding", "position_embedding", "conv_in", "conv_out")
TRAINED = ("unet", "text_encoder", "text_encoder_2")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One step's inputs, chosen by (seed, step)."""

    latents: Tensor  # (n, 4, h, w), standard deviation 1
    captions: list[str]
    zeroed: Tensor  # (n, 1), 0 where the conditioning is zeros
    time_ids: Tensor  # (n, 6)
    noise: Tensor
    timesteps: Tensor  # (n,)


def zero_outputs(unet: Any) -> None:
    """Let every residual branch and the whole network begin as nothing."""
    ends = ("conv2.weight", "proj_out.weight", "conv_out.weight", "conv2.bias", "proj_out.bias")
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if name.endswith((*ends, "conv_out.bias")):
                p.zero_()


def trained_parameters(pipeline: Any) -> dict[str, torch.nn.Parameter]:
    """Every parameter of UNet and text encoders, by name."""
    return {
        f"{part}.{name}": p
        for part in TRAINED
        for name, p in getattr(pipeline, part).named_parameters()
    }


def train_unet(
    pipeline: Any,
    latents: Tensor,
    scenes: Sequence[Scene],
    stage: Stage,
    young: bool = True,
) -> dict[str, Any]:
    """Train in place on `latents` (n, 4, h, w) of `scenes`; ends with the averaged weights.

    `young`: the weights start from nothing, so all scenes and timesteps come alike at first.
    Returns facts: steps, seconds, loss.
    """
    parameters, budget = trained_parameters(pipeline), stage.budget
    optimiser = MuonAdamW(parameters, *LEARNING_RATES, AVERAGE_DECAY, adamw_only=ADAMW_ONLY)
    smooth = stage.go_on(optimiser, "UNet", loss=1.0)
    for part in TRAINED:
        getattr(pipeline, part).train()
    saved = time.monotonic()
    while (progress := budget.progress(optimiser.steps)) < 1:
        step = optimiser.steps
        focused = not young or progress >= FOCUS_FROM
        batch = draw_batch(latents, scenes, stage.seed, step, focused)
        loss = prediction_loss(pipeline, batch)
        words = word_loss(pipeline, np.random.default_rng([stage.seed, step, 4]))
        (loss + words).backward()  # type: ignore[no-untyped-call]
        decay_from = DECAY_FROM if young else DECAY_FROM_TRAINED
        optimiser.step(learning_rate_share(progress, step, WARMUP, decay_from))
        smooth = 0.99 * smooth + 0.01 * float(loss.detach())
        if step % 50 == 0:
            logger.info("unet step %d %.0f s loss %.4f", step, budget.seconds, smooth)
        if time.monotonic() - saved > stage.save_every or budget.progress(optimiser.steps) >= 1:
            stage.save(optimiser, smooth)
            saved = time.monotonic()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(optimiser.average[name])
    for part in TRAINED:
        getattr(pipeline, part).eval()
    return stage.facts(optimiser, smooth)


def draw_batch(
    latents: Tensor, scenes: Sequence[Scene], seed: int, step: int, focused: bool = False
) -> Batch:
    """The batch of one step. Once through the pool in a new order, then again."""
    rng = np.random.default_rng([seed, step, 2])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    indices = _shuffled_indices(len(scenes), seed, step)
    timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
    if focused:
        indices = _prefer_plain(indices, scenes, rng)
        timesteps = _prefer_middle(timesteps, generator)
    captions = [describe_scene(scenes[index], rng) for index in indices]
    dropped = rng.random(BATCH) < DROPPED
    to_zeros = dropped & (rng.random(BATCH) < 0.5)
    picked = latents[torch.from_numpy(indices)].float()
    side = 4 * latents.shape[-1]
    return Batch(
        latents=picked,
        captions=["" if drop else text for drop, text in zip(dropped, captions, strict=True)],
        zeroed=torch.from_numpy(~to_zeros).float()[:, None],
        time_ids=torch.from_numpy(_draw_time_ids(rng, side)),
        noise=torch.randn(picked.shape, generator=generator),
        timesteps=timesteps,
    )


def prediction_loss(pipeline: Any, batch: Batch) -> Tensor:
    """Mean squared error of v."""
    noisy, target = diffuse(pipeline.scheduler.alphas_cumprod, batch)
    with fast_autocast():
        context, pooled = encode_captions(pipeline, batch.captions)
        prediction = pipeline.unet(
            noisy,
            batch.timesteps,
            context * batch.zeroed[..., None],
            added_cond_kwargs={"text_embeds": pooled * batch.zeroed, "time_ids": batch.time_ids},
        ).sample
    error: Tensor = prediction.float() - target
    return error.square().mean()


def word_loss(pipeline: Any, rng: np.random.Generator) -> Tensor:
    """How much the pooled state ignores rare words: mean over pairs of captions that differ in
    nothing else of (cosine - WORD_COSINE)^2 where the cosine is larger."""
    name = tuple(EMOJI)[int(rng.integers(len(EMOJI)))]
    words = {random_word(rng) for _ in range(WORDS_COMPARED)}
    captions = [f"a {word} {name}" for word in sorted(words)]
    captions = [f"a photo of {text}" for text in captions] if rng.random() < 0.5 else captions
    with fast_autocast():
        pooled = encode_captions(pipeline, captions)[1]
    units = torch.nn.functional.normalize(pooled.float(), dim=-1)
    above, right = torch.triu_indices(len(units), len(units), 1)
    excess = (units @ units.mT)[above, right] - WORD_COSINE
    return excess.clamp(min=0).square().mean()


def diffuse(alphas_cumprod: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Noisy latents and the target v, both (n, 4, h, w)."""
    a = alphas_cumprod[batch.timesteps][:, None, None, None].float()
    noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
    return noisy, a.sqrt() * batch.noise - (1 - a).sqrt() * batch.latents


def encode_captions(pipeline: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: penultimate states side by side (n, 77, 2 w), pooled state (n, w)."""
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(states, -1), pooled


def _shuffled_indices(count: int, seed: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    per_pass = count // BATCH
    passes, place = divmod(step, per_pass)
    order = np.random.default_rng([seed, passes, 3]).permutation(count)
    return order[place * BATCH : (place + 1) * BATCH]


def _prefer_plain(
    indices: np.ndarray[Any, np.dtype[np.int64]], scenes: Sequence[Scene], rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Replace half of the scenes with a rare word or of the second set by any that have neither."""
    chosen = indices.copy()
    for place in range(len(chosen)):
        replaced = rng.random() < FOCUS
        while replaced and not _is_plain(scenes[chosen[place]]):
            chosen[place] = rng.integers(len(scenes))
    return chosen


def _is_plain(scene: Scene) -> bool:
    return scene.word is None and scene.sprite_set == SETS[0]


def _prefer_middle(timesteps: Tensor, generator: torch.Generator) -> Tensor:
    mean, deviation = MIDDLE
    normal = torch.randn(timesteps.shape, generator=generator)
    middle = (1000 * torch.sigmoid(mean + deviation * normal)).long().clamp(0, 999)
    replaced = torch.rand(timesteps.shape, generator=generator) < FOCUS
    return torch.where(replaced, middle, timesteps)


def _draw_time_ids(rng: np.random.Generator, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    ids = np.tile(np.asarray([side, side, 0, 0, side, side], np.float32), (BATCH, 1))
    chosen = rng.random(BATCH) < 0.5
    original = np.exp(rng.uniform(np.log(side / 2), np.log(2048), (BATCH, 2)))
    crop = rng.uniform(0, 0.5, (BATCH, 2)) * original * (rng.random((BATCH, 1)) < 0.5)
    target = side * np.exp(rng.uniform(-0.4, 0.4, (BATCH, 2)))
    ids[chosen] = np.concatenate([original, crop, target], 1).round()[chosen]
    return ids
