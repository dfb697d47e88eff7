"""Drawing in latent space, with every state kept: DDIM (arXiv 2010.02502, eta = 0).

    x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t);   x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) e

with e the noise that the model sees in x_t (of a v-prediction: x_0 = sqrt(a) x - sqrt(1 - a) v, e =
sqrt(1 - a) x + sqrt(a) v), and guidance g in it: e_empty + g (e_prompt - e_empty). The times lie on
an even grid from the last one down, each but the first moved by a random offset towards the next.
Each image has offsets of its own, so that many of them meet all times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from lcp_plugin.hooks import Conditioning, Trajectory

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]  # latents, timesteps, conditioning
SMALLEST_SIGNAL = 1e-3  # sqrt(a) that x_0 is divided by at least (zero terminal SNR has 0)


def spread_times(total: int, steps: int, rows: int, generator: Generator) -> Tensor:
    """(steps, rows) timesteps from total - 1 down, at random offsets from an even grid."""
    grid = torch.linspace(total - 1, 0, steps + 1, dtype=torch.float64).unsqueeze(1)
    offsets = torch.rand(steps, rows, generator=generator, dtype=torch.float64)
    offsets[0] = 1.0
    return (grid[1:] + (grid[:-1] - grid[1:]) * offsets).round().long()


@torch.no_grad()
def draw_trajectory(
    predict: Predict,
    noise: Tensor,  # (n, 4, h, w), fp32, on the device
    conditioning: tuple[Conditioning, Conditioning],  # of the prompts, of no prompt: n rows each
    schedule: tuple[Tensor, str],  # cumulative alphas (train timesteps,), prediction type
    times: Tensor,  # (steps, n)
    guidance: float,
) -> Trajectory:
    """The states on the way from noise to images, on the CPU."""
    alphas = schedule[0].detach().cpu().double()[times].view(*times.shape, 1, 1, 1)
    latents, states, predictions = noise, [], []
    for place, stamps in enumerate(times):
        timesteps = stamps.to(noise.device)
        prediction = predict(latents, timesteps, conditioning[0])
        states.append(latents.cpu())
        predictions.append(prediction.cpu())
        if place + 1 == len(times):
            break
        if guidance != 1:
            empty = predict(latents, timesteps, conditioning[1])
            prediction = empty + guidance * (prediction - empty)
        latents = _step(latents, prediction, alphas[place], alphas[place + 1], schedule[1])
    return Trajectory(torch.cat(states), times.flatten(), torch.cat(predictions))


def _step(latents: Tensor, prediction: Tensor, now: Tensor, later: Tensor, kind: str) -> Tensor:
    """One DDIM step from a_t = now to a_s = later, (n, 1, 1, 1) each."""
    signal, noise = _roots(now, latents)
    if kind == "v_prediction":
        clean, found = signal * latents - noise * prediction, noise * latents + signal * prediction
    else:
        clean = (latents - noise * prediction) / signal.clamp(min=SMALLEST_SIGNAL)
        found = prediction
    signal, noise = _roots(later, latents)
    return signal * clean + noise * found


def _roots(alphas: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a), taken in fp64."""
    return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)


def in_parts(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows."""
    return (slice(i, i + size) for i in range(0, rows, size))
