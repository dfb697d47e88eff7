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
class Guidance:
    """What images are guided to and away from, as `encode_prompts` gives it, and by how much."""

    toward: Mapping[str, Tensor]  # a row per image, or one for all
    away: Mapping[str, Tensor]  # of the negative prompt, likewise
    scale: float = 5.0

    def of(self, count: int) -> Guidance:
        """A row per image for `count` of them."""

        def expand(texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key: v.expand(count, *v.shape[1:]) for key, v in texts.items()}

        return Guidance(expand(self.toward), expand(self.away), self.scale)

    def rows(self, start: int, stop: int) -> Guidance:
        """That of some images."""
        toward = {key: v[start:stop] for key, v in self.toward.items()}
        return Guidance(toward, {k: v[start:stop] for k, v in self.away.items()}, self.scale)


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
    guidance: Guidance,
    latents: Tensor,
    steps: int = 30,
    batch_size: int = 8,
) -> list[Image]:
    """One image per starting latent (n, c, h, w), `batch_size` at a time."""
    images: list[Image] = []
    guidance = guidance.of(len(latents))
    for i in range(0, len(latents), batch_size):
        part = latents[i : i + batch_size]
        rows = guidance.rows(i, i + batch_size)
        images.extend(decode_latents(pipeline, _denoise(pipeline, rows, part, steps)))
    return images


def _denoise(
    pipeline: StableDiffusionXLPipeline, guidance: Guidance, latents: Tensor, steps: int
) -> Tensor:
    """The scaled latents of images, as many at a time as fit into memory."""
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    factor = int(pipeline.vae_scale_factor)

    def work(start: int, stop: int) -> Tensor:
        def on_device(values: Tensor) -> Tensor:
            return values[start:stop].to(device, dtype)

        result = pipeline(
            prompt_embeds=on_device(guidance.toward["encoder_hidden_states"]),
            pooled_prompt_embeds=on_device(guidance.toward["text_embeds"]),
            negative_prompt_embeds=on_device(guidance.away["encoder_hidden_states"]),
            negative_pooled_prompt_embeds=on_device(guidance.away["text_embeds"]),
            latents=on_device(latents),
            num_inference_steps=steps,
            guidance_scale=guidance.scale,
            height=latents.shape[2] * factor,
            width=latents.shape[3] * factor,
            output_type="latent",
        )
        return torch.as_tensor(result.images)

    kind = ("denoise", tuple(latents.shape[1:]), str(dtype))
    return torch.cat(in_batches(kind, len(latents), work))


@torch.no_grad()
def decode_latents(pipeline: StableDiffusionXLPipeline, latents: Tensor) -> list[Image]:
    """Images of scaled latents (n, c, h, w), decoded in the VAE's own precision.

    That happens on the UNet's device, which the VAE leaves again if it came for this.
    """
    vae, home = pipeline.vae, pipeline.vae.device
    vae.to(pipeline.unet.device)
    pixels = decode_pixels(vae, latents)
    vae.to(home)
    pictures: list[Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures
