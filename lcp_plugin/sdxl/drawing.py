"""Images from fixed starting latents, the same for every prompt and every stage of a chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcp_plugin.sdxl.fitting import in_batches
from lcp_plugin.sdxl.latents import decode_pixels

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image


@dataclass(frozen=True)
class DrawSettings:
    """How images are drawn, whoever asks: a run, a prompt file or an evaluation."""

    steps: int
    guidance: float
    negative: str = ""  # prompt
    at_once: int = 8  # images of a batch


def starting_latents(
    pipeline: StableDiffusionXLPipeline, count: int, size: tuple[int, int], seed: int
) -> Tensor:
    """`count` starting latents from one CPU generator, before the scheduler scales them.

    Args:
        size: (height, width) in pixels.
    Returns:
        (count, channels, height / factor, width / factor), fp32.
    """
    factor = int(pipeline.vae_scale_factor)
    shape = (count, int(pipeline.unet.config.in_channels), size[0] // factor, size[1] // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw_images(
    pipeline: StableDiffusionXLPipeline,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    latents: Tensor,
    how: DrawSettings,
) -> list[Image]:
    """One image per starting latent; conditioning has a row per latent or one row for all.

    Args:
        conditioning: `encode_prompts` of the prompts; negative: of `how.negative`, one row.
        latents: (n, c, h, w) from `starting_latents`.
    """
    images: list[Image] = []
    count = len(latents)
    for i in range(0, count, how.at_once):
        stop = min(i + how.at_once, count)
        rows = {
            key: v[i:stop] if len(v) == count else v.expand(stop - i, *v.shape[1:])
            for key, v in conditioning.items()
        }
        empty = {key: v.expand(stop - i, *v.shape[1:]) for key, v in negative.items()}
        drawn = _denoise(pipeline, rows, empty, latents[i:stop], how)
        images.extend(decode_latents(pipeline, drawn))
    return images


def _denoise(
    pipeline: StableDiffusionXLPipeline,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    latents: Tensor,
    how: DrawSettings,
) -> Tensor:
    """The scaled latents of images, as many at a time as fit into memory."""
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    factor = int(pipeline.vae_scale_factor)

    def work(start: int, stop: int) -> Tensor:
        def on_device(values: Tensor) -> Tensor:
            return values[start:stop].to(device, dtype)

        result = pipeline(
            prompt_embeds=on_device(conditioning["encoder_hidden_states"]),
            pooled_prompt_embeds=on_device(conditioning["text_embeds"]),
            negative_prompt_embeds=on_device(negative["encoder_hidden_states"]),
            negative_pooled_prompt_embeds=on_device(negative["text_embeds"]),
            latents=on_device(latents),
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            height=latents.shape[2] * factor,
            width=latents.shape[3] * factor,
            output_type="latent",
        )
        return torch.as_tensor(result.images)

    kind = ("denoise", tuple(latents.shape[1:]), str(dtype))
    return torch.cat(in_batches(kind, len(latents), work))


@torch.no_grad()
def decode_latents(pipeline: StableDiffusionXLPipeline, latents: Tensor) -> list[Image]:
    """Images of scaled latents (n, c, h, w), decoded in the VAE's own precision and on the UNet's
    device, which the VAE leaves again if it came for this.
    """
    vae, home = pipeline.vae, pipeline.vae.device
    vae.to(pipeline.unet.device)
    pixels = decode_pixels(vae, latents)
    vae.to(home)
    pictures: list[Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures
