"""Loss on held-out images (`validation_split`), comparable between steps and between runs.

Every image is measured at four fixed timesteps, evenly spread inside [min_timestep, max_timestep),
with noise derived from (seed, batch, timestep): neither the data's order nor the training's random
state matters. Captions and crops are those of the batch's index. The loss is plain: no SNR weight,
no prior weight. (kohya-ss/sd-scripts measures at four fixed timesteps too, train_network.py at
48d368fa, but draws its noise anew.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from lcp_plugin.sdxl.loss import LossSettings, LossWeights, compute_loss
from lcp_plugin.sdxl.noise import NoiseSchedule, NoiseSettings
from lcp_plugin.seeds import derive_seed

NUM_TIMESTEPS = 4

PredictBatch = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]  # noisy, timesteps, batch


def validation_timesteps(
    settings: NoiseSettings, num_train_timesteps: int = 1000
) -> tuple[int, ...]:
    """Four timesteps inside the range of training: 200, 400, 600 and 800 by default."""
    low, high = settings.bounds(num_train_timesteps)
    step = (high - low) / (NUM_TIMESTEPS + 1)
    return tuple(int(low + step * (i + 1)) for i in range(NUM_TIMESTEPS))


@torch.no_grad()
def measure_loss(
    predict: PredictBatch,
    batches: Iterable[Mapping[str, Any]],
    noise_settings: NoiseSettings,
    loss_settings: LossSettings,
    schedule: NoiseSchedule,
    seed: int,
) -> float:
    """The mean loss over all images and timesteps; NaN without images.

    `batches`: those of TaskData(part="validation") with `latents` (b, 4, h, w) on the device.
    """
    plain = loss_settings.unweighted()
    timesteps = validation_timesteps(noise_settings, len(schedule.alphas))
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        latents, weights = batch["latents"], LossWeights(pixels=batch.get("masks"))
        for timestep in timesteps:
            generator = Generator().manual_seed(derive_seed(seed, "validation", number, timestep))
            noise = torch.randn(tuple(latents.shape), generator=generator).to(latents)
            steps = torch.full((len(latents),), timestep, device=latents.device)
            noisy, target = schedule.corrupt(latents, noise, steps)
            predicted = predict(noisy, steps, batch)
            loss = compute_loss(predicted, target, steps, schedule, plain, weights)
            total += float(loss) * len(latents)
            count += len(latents)
    return total / count if count else float("nan")
