"""Forward and backward passes of one step: the task's own micro-batches, and what is rehearsed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.hooks import Rehearsal
from lcp_plugin.sdxl.live_model import LiveStep
from lcp_plugin.sdxl.loss import LossWeights, compute_loss
from lcp_plugin.sdxl.noise import (
    add_noise,
    draw_timesteps,
    make_noise,
    make_target,
    perturb_noise,
    send,
)
from lcp_plugin.sdxl.trajectory import in_parts
from lcp_plugin.training.learner import Learner
from lcp_plugin.training.processes import meets_always

Batches = Iterator[Mapping[str, Any]]


def collect_gradients(learner: Learner, batches: Batches) -> tuple[Tensor, LiveStep]:
    """Gradients of a step. Returns [loss, objective, rehearsal or NaN] on the device, and the
    last micro-batch as the strategy sees it.
    """
    accelerator, strategy = learner.room.accelerator, learner.room.strategy
    accumulation = learner.lesson.options.gradient_accumulation_steps
    losses, objectives = [], []
    live: LiveStep | None = None
    rehearsal = None
    learner.updates.open()
    for micro in range(accumulation):
        batch = next(batches)
        if micro == 0:
            rehearsal = _rehearse(learner, batch)
        last = micro == accumulation - 1
        with _meeting(learner, last), learner.draws.seeded("dropout", learner.step, micro):
            loss, live = _forward(learner, batch, micro)
            objective = strategy.before_backward(live, loss)
            accelerator.backward(objective / accumulation)
        losses.append(loss.detach())
        objectives.append(objective.detach())
    assert live is not None
    means = _join(torch.stack(losses).mean(), torch.stack(objectives).mean(), rehearsal)
    if accelerator.num_processes > 1:
        means = accelerator.reduce(means, reduction="mean")
    return means, live


def _join(loss: Tensor, objective: Tensor, rehearsal: tuple[Tensor, float] | None) -> Tensor:
    """[loss, objective with what is rehearsed, rehearsal or NaN]."""
    if rehearsal is None:
        return torch.stack([loss, objective, objective.new_tensor(math.nan)])
    rehearsed, weight = rehearsal
    return torch.stack([loss, objective + weight * rehearsed, rehearsed])


def _meeting(learner: Learner, last: bool) -> AbstractContextManager[None]:
    """Processes add up their gradients behind the last pass of a step only."""
    accelerator = learner.room.accelerator
    waits = accelerator.no_sync(learner.updates.model)
    return nullcontext() if last or meets_always(accelerator) else waits


def _forward(learner: Learner, batch: Mapping[str, Any], micro: int) -> tuple[Tensor, LiveStep]:
    """The loss of one micro-batch."""
    settings, schedule, step = learner.noise, learner.room.base.schedule, learner.step
    alphas = schedule.alphas
    tensors = learner.complete(batch)
    generator = learner.draws.generator("noise", step, micro)
    latents = tensors["latents"]
    noise = make_noise(latents, settings, generator)
    timesteps = draw_timesteps(len(latents), settings, len(alphas), generator)
    timesteps = send(timesteps, latents.device)
    noise_in = perturb_noise(noise, settings, generator)
    noisy = add_noise(latents, noise_in, timesteps, alphas)
    target = make_target(latents, noise, timesteps, alphas, schedule.prediction_type)
    target = _preserve(learner, target, noisy, timesteps, tensors)
    prediction = learner.model.predict(noisy, timesteps, tensors)
    weights = LossWeights.of(tensors)
    loss = compute_loss(prediction, target, timesteps, schedule, learner.loss, weights)
    live = LiveStep(
        model=learner.model,
        index=step,
        total=learner.total,
        batch={**tensors, "noise": noise, "noisy_latents": noisy},
        prediction=prediction,
        target=target,
        timesteps=timesteps,
        generator=learner.draws.generator("strategy", step, micro),
    )
    return loss, live


def _preserve(
    learner: Learner,
    target: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    batch: Mapping[str, Tensor],
) -> Tensor:
    """Differential output preservation: images that ask for it have what the model said before
    this task as their target (kohya's diff_output_preservation).
    """
    if "preserve" not in batch:
        return target
    before = learner.model.predict(noisy, timesteps, batch, "carry")
    return torch.where(batch["preserve"].view(-1, 1, 1, 1), before, target)


# ----------------------------------------------------------------------------------- rehearsal


def _rehearse(learner: Learner, batch: Mapping[str, Any]) -> tuple[Tensor, float] | None:
    """A strategy's examples of earlier tasks: forward and backward, in pieces of the task's
    batch size; their mean squared error and its weight.
    """
    empty, index, room = torch.empty(0), learner.step, learner.room
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    draws = learner.draws.generator("rehearsal", index, 0)
    step = LiveStep(learner.model, index, learner.total, tensors, empty, empty, empty, draws)
    rehearsal = room.strategy.rehearse(step)
    if rehearsal is None:
        return None
    rows, total = len(rehearsal.latents), torch.zeros((), device=room.base.device)
    for number, part in enumerate(in_parts(rows, len(batch["time_ids"]))):
        seeded = learner.draws.seeded("rehearsal dropout", index, number)
        with _meeting(learner, last=False), seeded:
            error = _rehearsal_error(learner, rehearsal, part)
            share = len(rehearsal.timesteps[part]) / rows
            room.accelerator.backward(rehearsal.weight * share * error)
        total += share * error.detach()
    return total, rehearsal.weight


def _rehearsal_error(learner: Learner, rehearsal: Rehearsal, part: slice) -> Tensor:
    base = learner.room.base
    conditioning = {k: send(v[part], base.device) for k, v in rehearsal.conditioning.items()}
    if learner.lesson.options.trains_text_encoders and rehearsal.prompts:
        conditioning |= base.encode_live(list(rehearsal.prompts)[part])
    latents, target = (send(t[part], base.device) for t in (rehearsal.latents, rehearsal.target))
    timesteps = send(rehearsal.timesteps[part], base.device)
    return (learner.model.predict(latents, timesteps, conditioning) - target).square().mean()
