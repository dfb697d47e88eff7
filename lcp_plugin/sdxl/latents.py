"""Scaled latents of a VAE, in both directions: z = (latent - mean) scale / std, and back.

SDXL's own VAE has a scale alone (scaling_factor .13025). Replacement VAEs may name a mean and a
standard deviation by channel (latents_mean, latents_std), or one shift (shift_factor).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """What the UNet sees of a VAE's latents (b, c, h, w)."""
    mean, std = _mean_and_std(vae, latents)
    return (latents - mean) * (float(vae.config.scaling_factor) / std)


def unscale_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `scale_latents`."""
    mean, std = _mean_and_std(vae, latents)
    return latents * std / float(vae.config.scaling_factor) + mean


def _mean_and_std(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    mean = getattr(vae.config, "latents_mean", None)
    std = getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        return like.new_tensor(mean).view(shape), like.new_tensor(std).view(shape)
    return float(getattr(vae.config, "shift_factor", None) or 0.0), 1.0
