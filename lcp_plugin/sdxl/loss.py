"""The training loss: per pixel, masked, averaged per image, weighed by the timestep's SNR.

snr_t = a_t / (1 - a_t). Min-SNR: arXiv 2303.09556; debiased estimation: arXiv 2310.08442; Huber
schedules: arXiv 2403.16728. Order and forms as in kohya-ss/sd-scripts (train_network.py and
library/train_util.py, library/custom_train_functions.py at 48d368fa), with two differences:
huber_scale holds for huber_schedule=snr too, and an SNR of exactly 0 (zero terminal SNR) is raised
to 1e-8, so that the weights of epsilon-prediction stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl.devices import widen
from lcp_plugin.sdxl.noise import NoiseSchedule

_SNR_CAP = 1000.0  # of the weights other than min-SNR, as kohya has it
_SNR_FLOOR = 1e-8


@dataclass(frozen=True)
class LossSettings:
    """The loss per pixel and the weights by SNR; the plain mean squared error by default."""

    kind: str = "l2"  # or l1, huber, smooth_l1
    huber_schedule: str = "snr"  # or exponential, constant
    huber_c: float = 0.1  # where squares turn to absolute values, where nothing scales it down
    huber_scale: float = 1.0
    min_snr_gamma: float = 0.0  # 0: no such weight
    like_v_prediction: float = 0.0  # adds this times what v-prediction's weight would add
    like_noise_prediction: bool = False  # weighs v-prediction as epsilon is weighed
    debiased: bool = False

    @classmethod
    def of(cls, options: Options) -> LossSettings:
        """What the options ask for."""
        return cls(
            kind=options.loss_type,
            huber_schedule=options.huber_schedule,
            huber_c=options.huber_c,
            huber_scale=options.huber_scale,
            min_snr_gamma=options.min_snr_gamma or 0.0,
            like_v_prediction=options.v_pred_like_loss or 0.0,
            like_noise_prediction=options.scale_v_pred_loss_like_noise_pred,
            debiased=options.debiased_estimation_loss,
        )

    def unweighted(self) -> LossSettings:
        """The same loss per pixel, alike at all timesteps."""
        return LossSettings(self.kind, self.huber_schedule, self.huber_c, self.huber_scale)


@dataclass(frozen=True)
class LossWeights:
    """What a batch's images and pixels count."""

    images: Tensor | None = None  # (b,)
    pixels: Tensor | None = None  # masks (b, 1, H, W) in [0, 1]

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> LossWeights:
        """Those that a batch of TaskData brings."""
        return cls(batch.get("loss_weights"), batch.get("masks"))


ALL_ALIKE = LossWeights()


def signal_to_noise(alphas: Tensor, timesteps: Tensor) -> Tensor:
    """a_t / (1 - a_t), at least 1e-8   # (b,), fp32."""
    a = widen(alphas.to(timesteps.device)[timesteps])
    return (a / (1.0 - a)).clamp(min=_SNR_FLOOR).float()


def huber_thresholds(timesteps: Tensor, alphas: Tensor, settings: LossSettings) -> Tensor:
    """Where the Huber losses turn from squares to absolute values   # (b,), fp32."""
    c, scale = settings.huber_c, settings.huber_scale
    if settings.huber_schedule == "constant":
        return torch.full(timesteps.shape, c * scale, device=timesteps.device)
    if settings.huber_schedule == "exponential":
        rate = -math.log(c) / len(alphas)
        return torch.exp(-rate * timesteps.float()) * scale
    sigma = signal_to_noise(alphas, timesteps).rsqrt()  # sqrt((1 - a) / a)
    return ((1.0 - c) / (1.0 + sigma) ** 2 + c) * scale


def pixel_loss(
    prediction: Tensor, target: Tensor, loss_type: str, thresholds: Tensor | None = None
) -> Tensor:
    """l2, l1, huber 2c (sqrt(d^2 + c^2) - c) or smooth_l1 2 (sqrt(d^2 + c^2) - c)  # as given."""
    difference = prediction - target
    if loss_type == "l2":
        return difference**2
    if loss_type == "l1":
        return difference.abs()
    if thresholds is None or loss_type not in ("huber", "smooth_l1"):
        raise ValueError(f"loss type {loss_type!r}: l2, l1, huber or smooth_l1 with thresholds")
    c = thresholds.view(-1, *[1] * (difference.dim() - 1))
    rounded = 2.0 * (torch.sqrt(difference**2 + c**2) - c)
    return c * rounded if loss_type == "huber" else rounded


def snr_weights(snr: Tensor, settings: LossSettings, prediction_type: str) -> Tensor:
    """The product of the weights that are asked for   # (b,), fp32."""
    is_v = prediction_type == "v_prediction"
    capped = snr.clamp(max=_SNR_CAP)
    weights = torch.ones_like(snr)
    if settings.min_snr_gamma:
        least = snr.clamp(max=settings.min_snr_gamma)
        weights = weights * (least / (snr + 1.0) if is_v else least / snr)
    if settings.like_noise_prediction and is_v:
        weights = weights * capped / (capped + 1.0)
    if settings.like_v_prediction:
        weights = weights * (1.0 + settings.like_v_prediction * (capped + 1.0) / capped)
    if settings.debiased:
        weights = weights * (1.0 / (capped + 1.0) if is_v else capped.rsqrt())
    return weights


def apply_masks(loss: Tensor, masks: Tensor) -> Tensor:
    """Pixel losses times masks (b, 1, H, W) in [0, 1], averaged down to the loss's size."""
    small = functional.interpolate(masks.to(loss.device, loss.dtype), loss.shape[-2:], mode="area")
    return loss * small


def image_losses(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    settings: LossSettings,
    weights: LossWeights = ALL_ALIKE,
) -> Tensor:
    """The weighted loss of each image   # (b,), fp32."""
    alphas, thresholds = schedule.alphas, None
    if settings.kind in ("huber", "smooth_l1"):
        thresholds = huber_thresholds(timesteps, alphas, settings).to(prediction.device)
    loss = pixel_loss(prediction.float(), target.float(), settings.kind, thresholds)
    if weights.pixels is not None:
        loss = apply_masks(loss, weights.pixels)
    per_image = loss.mean(dim=tuple(range(1, loss.dim())))
    if weights.images is not None:
        per_image = per_image * weights.images.to(per_image)
    snr = signal_to_noise(alphas, timesteps)
    return per_image * snr_weights(snr, settings, schedule.prediction_type).to(per_image)


def compute_loss(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    settings: LossSettings,
    weights: LossWeights = ALL_ALIKE,
) -> Tensor:
    """The mean of `image_losses`   # scalar, fp32."""
    return image_losses(prediction, target, timesteps, schedule, settings, weights).mean()
