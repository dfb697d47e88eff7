"""Pixels to the latents that the UNet sees, and back: z = (latent - mean) scale / std.

latent: the mean of what the VAE's encoder says of an image, never a sample, so that it can be kept.
SDXL's own VAE has a scale alone (scaling_factor .13025). Replacement VAEs may name a mean and a
standard deviation by channel (latents_mean, latents_std), or one shift (shift_factor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.sdxl.fitting import in_batches, whole_or_tiled


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents (n, c, h, w) of pixels (n, 3, H, W) in [-1, 1], on the VAE's device, in fp32.

    The VAE runs in its own precision, on as much at a time as fits.
    """
    given = pixels.to(vae.device, vae.dtype)
    latents = _run("encode", vae, given, lambda part: vae.encode(part).latent_dist.mode())
    return scale_latents(vae, torch.cat(latents).float())


@torch.no_grad()
def decode_pixels(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (n, 3, H, W) of scaled latents (n, c, h, w), on the CPU in fp32.

    The VAE runs where and in what it is, as in `encode_pixels`.
    """
    raw = unscale_latents(vae, latents.to(vae.device, vae.dtype))
    pixels = _run("decode", vae, raw, lambda part: vae.decode(part, return_dict=False)[0].cpu())
    return torch.cat(pixels).float()


def _run(what: str, vae: Any, given: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    kind = (what, tuple(given.shape[1:]), str(given.dtype))

    def work(start: int, stop: int) -> Tensor:
        part = given[start:stop]
        return whole_or_tiled(vae, kind, part, lambda: run(part))

    return in_batches(kind, len(given), work)


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """What the UNet sees of a VAE's latents (b, c, h, w)."""
    mean, std = _mean_and_std(vae, latents)
    return (latents - mean) * (float(vae.config.scaling_factor) / std)


def unscale_latents(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's latents of what the UNet sees (b, c, h, w)."""
    mean, std = _mean_and_std(vae, latents)
    return latents * std / float(vae.config.scaling_factor) + mean


def _mean_and_std(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    mean = getattr(vae.config, "latents_mean", None)
    std = getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        return like.new_tensor(mean).view(shape), like.new_tensor(std).view(shape)
    return float(getattr(vae.config, "shift_factor", None) or 0.0), 1.0
