"""Images from a pipeline with fixed starting latents, the same for every prompt and every stage of
a chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcp_plugin.sdxl.latents import unscale_latents

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image


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
def sample_images(
    pipeline: StableDiffusionXLPipeline,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    latents: Tensor,
    steps: int = 30,
    guidance: float = 5.0,
    batch_size: int = 8,
) -> list[Image]:
    """One image per starting latent; conditioning has a row per latent or one row for all.

    Args:
        conditioning: `encode_prompts` of the prompts; negative: of the negative prompt, one row.
        latents: (n, c, h, w) from `starting_latents`.
    """
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    factor = int(pipeline.vae_scale_factor)
    images: list[Image] = []
    for i in range(0, len(latents), batch_size):
        part = latents[i : i + batch_size]
        rows = {
            key: (
                v[i : i + batch_size]
                if len(v) == len(latents)
                else v.expand(len(part), *v.shape[1:])
            )
            for key, v in conditioning.items()
        }
        empty = {key: v.expand(len(part), *v.shape[1:]) for key, v in negative.items()}
        result = pipeline(
            prompt_embeds=rows["encoder_hidden_states"].to(device, dtype),
            pooled_prompt_embeds=rows["text_embeds"].to(device, dtype),
            negative_prompt_embeds=empty["encoder_hidden_states"].to(device, dtype),
            negative_pooled_prompt_embeds=empty["text_embeds"].to(device, dtype),
            latents=part.to(device, dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=part.shape[2] * factor,
            width=part.shape[3] * factor,
            output_type="latent",
        )
        images.extend(decode_latents(pipeline, torch.as_tensor(result.images)))
    return images


@torch.no_grad()
def decode_latents(pipeline: StableDiffusionXLPipeline, latents: Tensor) -> list[Image]:
    """Images of scaled latents (n, c, h, w), decoded in the VAE's own precision."""
    vae = pipeline.vae
    latents = unscale_latents(vae, latents.to(vae.device, vae.dtype))
    pixels = vae.decode(latents, return_dict=False)[0]
    pictures: list[Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures
