"""Pretraining, first part: the autoencoder.

Squared error, deterministic latents with relative noise (so that the decoder forgives the UNet's
errors), then ZCA whitening of the latents over the world, folded exactly into quant_conv and
post_quant_conv:  z' = s W (z - m)  with  W = C^(-1/2), s = 1 / scaling_factor;  the decoder's first
convolution takes  z = W^(-1) z' / s + m.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny_base.muon import MuonAdamW
from tiny_base.precision import fast_autocast
from tiny_base.schedule import Stage, learning_rate_share

LATENT_NOISE = 0.06  # of a latent channel's standard deviation
LEARNING_RATES = (5e-3, 2e-3)  # Muon, AdamW
AVERAGE_DECAY = 0.998
BATCH = 16
ADAMW_ONLY = ("conv_in", "conv_out", "quant_conv")
LOGVAR = -30.0  # the latent distribution's width: none
logger = logging.getLogger(__name__)


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(n, side, side, 3), 0 to 255 -> (n, 3, side, side), -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def train_vae(vae: Any, pool: NDArray[np.uint8], stage: Stage) -> dict[str, Any]:
    """Train `vae` in place on `pool` (n, side, side, 3); ends with the averaged weights in it.

    Returns facts: steps, seconds, loss.
    """
    vae.train()
    budget = stage.budget
    optimiser = MuonAdamW(
        dict(vae.named_parameters()), *LEARNING_RATES, AVERAGE_DECAY, adamw_only=ADAMW_ONLY
    )
    smooth = stage.go_on(optimiser, "autoencoder", loss=0.0)
    saved = time.monotonic()
    while (progress := budget.progress(optimiser.steps)) < 1:
        step = optimiser.steps
        loss = vae_loss(vae, pool, stage.seed, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(learning_rate_share(progress, step, warmup=50, decay_from=0.5))
        smooth = float(loss.detach()) if step == 0 else 0.98 * smooth + 0.02 * float(loss.detach())
        if step % 100 == 0:
            logger.info("vae step %d %.0f s loss %.5f", step, budget.seconds, smooth)
        if time.monotonic() - saved > stage.save_every or budget.progress(optimiser.steps) >= 1:
            stage.save(optimiser, smooth)
            saved = time.monotonic()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            p.copy_(optimiser.average[name])
    vae.eval()
    return stage.facts(optimiser, smooth)


def vae_loss(vae: Any, pool: NDArray[np.uint8], seed: int, step: int) -> Tensor:
    """Squared error of one batch, chosen by (seed, step)."""
    rng = np.random.default_rng([seed, step, 1])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    batch = to_tensor(pool[rng.integers(len(pool), size=BATCH)])
    batch = batch.flip(-1) if rng.random() < 0.5 else batch
    with fast_autocast():
        latents = vae.encode(batch).latent_dist.mean  # (n, 4, side / 4, side / 4)
        width = latents.detach().float().std(dim=(0, 2, 3), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator)
        decoded = vae.decode(latents + LATENT_NOISE * width * noise).sample
    error: Tensor = decoded.float() - batch
    return error.square().mean()


@torch.no_grad()
def whiten_latents(vae: Any, pictures: NDArray[np.uint8], scaling_factor: float) -> None:
    """Make the latents of `pictures` white with standard deviation 1 / scaling_factor, without
    changing any reconstruction."""
    latents = torch.cat(
        [vae.encode(part).latent_dist.mean for part in torch.split(to_tensor(pictures), 64)]
    )
    flat = latents.permute(1, 0, 2, 3).flatten(1).double()  # (4, n)
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T / scaling_factor
    encode, decode = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    weight = encode.weight[:channels, :, 0, 0].double()
    encode.weight[:channels] = (whiten @ weight).float()[..., None, None]
    encode.bias[:channels] = (whiten @ (encode.bias[:channels].double() - mean)).float()
    encode.weight[channels:] = 0
    encode.bias[channels:] = LOGVAR
    weight = decode.weight[:, :, 0, 0].double()
    decode.bias += (weight @ mean).float()
    decode.weight.copy_((weight @ torch.linalg.inv(whiten)).float()[..., None, None])


@torch.no_grad()
def reconstruct(vae: Any, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures through the autoencoder, (n, side, side, 3)."""
    parts = []
    for part in torch.split(to_tensor(pictures), 64):
        decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def measure_psnr(vae: Any, pictures: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error over all pictures."""
    error = reconstruct(vae, pictures).astype(np.float64) - pictures
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def write_facts(file: Path, facts: dict[str, Any]) -> None:
    """Facts of a finished stage, beside its checkpoint."""
    file.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
