"""Noise, timesteps, noisy latents and targets of diffusion training.

With a_t the cumulative product of alphas: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e; the target is e
(epsilon) or v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (arXiv 2202.00512).
Noise offset: crosslabs.org/blog/diffusion-with-offset-noise; pyramid noise: wandb.ai/johnowhitaker
"Multi-Resolution Noise"; input perturbation: arXiv 2301.11706; zero terminal SNR: arXiv 2305.08891.
Forms and defaults as in kohya-ss/sd-scripts (library/custom_train_functions.py at 48d368fa).

Random numbers come from a CPU generator, in fp32, and move to the latents' device afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from lcp_plugin.config.options import Options


@dataclass(frozen=True)
class NoiseSettings:
    """What noise is drawn, and at which timesteps; plain Gaussian at all of them by default."""

    lowest: int = 0  # timestep
    below: int | None = None  # timesteps stay below it; None: below all there are
    offset: float = 0.0  # strength of a shift per image and channel
    offset_varies: bool = False  # it is drawn between 0 and `offset`
    offset_by_mean: float = 0.0  # times |mean latent|, added to it
    pyramid_layers: int = 0
    pyramid_discount: float = 0.3  # strength of a layer, relative to the finer one
    perturbation: float = 0.0  # of the input: noise that is no target
    perturbation_varies: bool = False  # it is drawn between 0 and `perturbation`

    @classmethod
    def of(cls, options: Options) -> NoiseSettings:
        """What the options ask for."""
        return cls(
            lowest=options.min_timestep or 0,
            below=options.max_timestep or None,
            offset=options.noise_offset or 0.0,
            offset_varies=options.noise_offset_random_strength,
            offset_by_mean=options.adaptive_noise_scale or 0.0,
            pyramid_layers=options.multires_noise_iterations or 0,
            pyramid_discount=options.multires_noise_discount,
            perturbation=options.ip_noise_gamma or 0.0,
            perturbation_varies=options.ip_noise_gamma_random_strength,
        )

    def bounds(self, num_train_timesteps: int) -> tuple[int, int]:
        """The range of timesteps: the first of them, and the first beyond."""
        return self.lowest, min(self.below or num_train_timesteps, num_train_timesteps)


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise a timestep has, and what the base predicts of it."""

    alphas: Tensor  # cumulative products, (train timesteps,), the device's widest float
    prediction_type: str = "epsilon"  # or v_prediction
    zero_terminal: bool = False  # whether a run asked for it: the last step is pure noise

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents at the timesteps (b,), and the target that the base's type asks for."""
        noisy = add_noise(latents, noise, timesteps, self.alphas)
        return noisy, make_target(latents, noise, timesteps, self.alphas, self.prediction_type)


def zero_terminal_betas(betas: Tensor) -> Tensor:
    """Betas whose last step is pure noise (arXiv 2305.08891, algorithm 1)   # (steps,), fp64.

    sqrt(a) is shifted so that the last is 0 and scaled so that the first stays.
    """
    root = torch.cumprod(1.0 - betas.double(), dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    product = root**2
    alphas = torch.cat([product[:1], product[1:] / product[:-1]])
    return 1.0 - alphas


def alphas_cumprod(betas: Tensor) -> Tensor:
    """a_t = prod (1 - beta)   # (steps,), fp64."""
    return torch.cumprod(1.0 - betas.double(), dim=0)


def draw_timesteps(
    batch: int, settings: NoiseSettings, num_train_timesteps: int, generator: Generator
) -> Tensor:
    """Timesteps uniform in [lowest, below); constant where they are equal  # (b,)."""
    low, high = settings.bounds(num_train_timesteps)
    if low >= high:
        return torch.full((batch,), min(low, num_train_timesteps - 1), dtype=torch.int64)
    return torch.randint(low, high, (batch,), generator=generator)


def make_noise(latents: Tensor, settings: NoiseSettings, generator: Generator) -> Tensor:
    """Gaussian noise with the offset and the pyramid that are asked for  # as latents."""
    noise = _gaussian(latents.shape, generator)
    if settings.offset:
        noise = noise + _offset(latents, settings, generator)
    if settings.pyramid_layers:
        layers, discount = settings.pyramid_layers, settings.pyramid_discount
        noise = add_pyramid(noise, layers, discount, generator)
    return send(noise.to(latents.dtype), latents.device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU from pinned memory, without waiting for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _gaussian(shape: torch.Size | tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def _offset(latents: Tensor, settings: NoiseSettings, generator: Generator) -> Tensor:
    """A shift per image and channel   # (b, c, 1, 1), fp32."""
    strength = torch.tensor(float(settings.offset))
    if settings.offset_varies:
        strength = strength * torch.rand((), generator=generator)
    if settings.offset_by_mean:
        mean = latents.detach().float().cpu().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + settings.offset_by_mean * mean).clamp(min=0)
    return strength * _gaussian((*latents.shape[:2], 1, 1), generator)


def add_pyramid(noise: Tensor, iterations: int, discount: float, generator: Generator) -> Tensor:
    """Noise of ever coarser grids added, each `discount` as strong, the sum scaled to std 1.

    The i-th grid is smaller by r^i with r uniform in [2, 4), drawn anew for each; the first one has
    full size (as kohya has it).
    """
    height, width = noise.shape[-2:]
    for i in range(iterations):
        r = 2.0 + 2.0 * float(torch.rand((), generator=generator))
        size = max(1, int(height / r**i)), max(1, int(width / r**i))
        layer = _gaussian((*noise.shape[:2], *size), generator)
        layer = functional.interpolate(
            layer, size=(height, width), mode="bilinear", align_corners=False
        )
        noise = noise + layer * discount**i
        if 1 in size:
            break
    return noise / noise.std()


def perturb_noise(noise: Tensor, settings: NoiseSettings, generator: Generator) -> Tensor:
    """The noise that is added to the latents: the target's, and more with input perturbation."""
    if not settings.perturbation:
        return noise
    strength = torch.tensor(float(settings.perturbation))
    if settings.perturbation_varies:
        strength = strength * torch.rand((), generator=generator)
    extra = strength * _gaussian(noise.shape, generator)
    return noise + send(extra.to(noise.dtype), noise.device)


def _at(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """values[timesteps], shaped to multiply `like`   # (b, 1, 1, 1), fp32."""
    chosen = values.to(timesteps.device)[timesteps].to(like.device, torch.float32)
    return chosen.view(-1, *[1] * (like.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e; `alphas` are the cumulative products  # as latents."""
    a = _at(alphas, timesteps, latents)
    noisy = a.sqrt() * latents.float() + (1.0 - a).sqrt() * noise.float()
    return noisy.to(latents.dtype)


def make_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor, prediction_type: str
) -> Tensor:
    """The noise, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0   # as latents, fp32."""
    if prediction_type == "epsilon":
        return noise.float()
    if prediction_type != "v_prediction":
        raise ValueError(f"prediction type {prediction_type!r}: epsilon or v_prediction")
    a = _at(alphas, timesteps, latents)
    return a.sqrt() * noise.float() - (1.0 - a).sqrt() * latents.float()
