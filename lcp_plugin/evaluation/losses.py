"""Scores without images: what the model predicts of fixed noise on the tasks' own pictures.

The noise bank of a task: 16 timesteps (evenly spaced over the schedule) x 2 noises x its images,
the same for every state of the model.

    L[i, j]      mean squared error of the prediction after task j on task i's bank
    normalised   (L_base - L) / (L_base - L_independent): 0 the base, 1 a model of that task alone
    self-drift   ||p_j - p_i||^2 / ||p_i - p_base||^2: how far the predictions on task i's bank have
                 moved since it was learned, in units of how far learning moved them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage
from lcp_plugin.evaluation.generate import Stage, Studio
from lcp_plugin.evaluation.images import Preprocessing, open_rgb, preprocess
from lcp_plugin.sdxl.conditioning import make_time_ids
from lcp_plugin.sdxl.live import run_unet
from lcp_plugin.sdxl.load import native_resolution, prediction_type
from lcp_plugin.seeds import derive_seed

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

TIMESTEPS, NOISES, IMAGES, BATCH = 16, 2, 5, 16


@dataclass(frozen=True)
class Bank:
    """One task's noisy latents and what the model should say of them."""

    noisy: Tensor  # (n, c, h, w), fp32
    target: Tensor  # (n, c, h, w): the noise, or v
    timesteps: Tensor  # (n,)
    prompt: str


@dataclass
class Prober:
    """Predictions of any state of the model on any task's bank."""

    studio: Studio
    seed: int = 42
    banks: dict[str, Bank] = field(default_factory=dict)

    def predict(self, stage: Stage, task: EvalTask) -> Tensor:
        """The model's output on the task's bank   # (n, c, h, w), fp32 on the CPU."""
        return self._run(stage, self.bank(task))

    def loss(self, prediction: Tensor, task: EvalTask) -> float:
        """Mean squared error of a prediction on the task's bank."""
        error = prediction.double() - self.bank(task).target.double()
        return float(error.square().mean())

    def bank(self, task: EvalTask) -> Bank:
        """The task's bank, made at the first call."""
        if task.name not in self.banks:
            pipeline = self.studio.pipeline()
            clean = encode_images(pipeline, task.references[:IMAGES])
            seed = derive_seed(self.seed, "bank", task.name)
            prompt = task.train_prompt.replace("{class_name}", "a house") or task.concept
            self.banks[task.name] = make_bank(pipeline, clean, prompt, seed)
        return self.banks[task.name]

    @torch.no_grad()
    def _run(self, stage: Stage, bank: Bank) -> Tensor:
        pipeline, prompts = self.studio.stand_on(stage)
        prompts.add(pipeline, [bank.prompt])
        side = native_resolution(pipeline)
        fixed = {
            **prompts([bank.prompt]),
            "time_ids": make_time_ids((side, side), (0, 0), (side, side)),
        }
        device, dtype = pipeline.unet.device, pipeline.unet.dtype
        parts = []
        for start in range(0, len(bank.noisy), BATCH):
            noisy = bank.noisy[start : start + BATCH].to(device)
            steps = bank.timesteps[start : start + BATCH].to(device)
            rows = {k: v.expand(len(noisy), *v.shape[1:]).to(device) for k, v in fixed.items()}
            parts.append(run_unet(pipeline.unet, noisy, steps, rows, dtype).cpu())
        return torch.cat(parts)


@torch.no_grad()
def encode_images(pipeline: StableDiffusionXLPipeline, files: Sequence[Path]) -> Tensor:
    """Scaled latents of centre-cropped images   # (n, c, h, w), fp32."""
    side = native_resolution(pipeline)
    how = Preprocessing(side, side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images: list[Image.Image] = [open_rgb(file) for file in files]
    pixels = torch.stack([preprocess(image, how) for image in images])
    vae = pipeline.vae
    latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents.float() * float(vae.config.scaling_factor)).cpu()


def make_bank(pipeline: StableDiffusionXLPipeline, clean: Tensor, prompt: str, seed: int) -> Bank:
    """Every image with every timestep and noise."""
    alphas = pipeline.scheduler.alphas_cumprod.float().cpu()
    total = len(alphas)
    steps = ((torch.arange(TIMESTEPS) + 0.5) * total / TIMESTEPS).long()  # midpoints
    generator = torch.Generator().manual_seed(seed)
    count = len(clean) * TIMESTEPS * NOISES
    noise = torch.randn((count, *clean.shape[1:]), generator=generator)
    timesteps = steps.repeat_interleave(NOISES).repeat(len(clean))
    images = clean.repeat_interleave(TIMESTEPS * NOISES, dim=0)
    signal, spread = (
        x.sqrt().view(-1, 1, 1, 1) for x in (alphas[timesteps], 1 - alphas[timesteps])
    )
    noisy = signal * images + spread * noise
    is_v = prediction_type(pipeline) == "v_prediction"
    target = signal * noise - spread * images if is_v else noise
    return Bank(noisy, target, timesteps, prompt)


def measure_losses(prober: Prober, chain: Chain) -> dict[str, Any]:
    """L and self-drift over (task, state), NaN before a task is learned, and the base's L."""
    count = len(chain.tasks)
    losses, drift = np.full((count, count), np.nan), np.full((count, count), np.nan)
    base = [prober.predict(base_stage(chain.base_hash), task) for task in chain.tasks]
    learned: dict[int, Tensor] = {}
    for i, j in chain.cells():  # oldest state first: (i, i) comes before (i, j > i)
        task = chain.tasks[i]
        now = prober.predict(chain.stages[j], task)
        learned.setdefault(i, now)
        losses[i, j] = prober.loss(now, task)
        drift[i, j] = self_drift(now, learned[i], base[i])
    at_base = [prober.loss(p, task) for p, task in zip(base, chain.tasks, strict=True)]
    return {"losses": losses, "self_drift": drift, "base": np.array(at_base)}


def self_drift(now: Tensor, learned: Tensor, base: Tensor) -> float:
    """||now - learned||^2 / ||learned - base||^2; NaN where learning changed nothing."""
    moved = float((learned.double() - base.double()).square().sum())
    return (
        float((now.double() - learned.double()).square().sum()) / moved if moved else float("nan")
    )


def losses_alone(prober: Prober, chain: Chain) -> Mapping[str, float]:
    """Of an `independent` run: every task's loss under its own adapter alone."""
    return {
        task.name: prober.loss(prober.predict(stage, task), task)
        for task, stage in zip(chain.tasks, chain.stages, strict=True)
    }
