"""Samples of a prompt file during training (`sample_prompts`), drawn with kohya's settings.

The live pipeline's UNet, with whatever LoRA is on it, is used; its scheduler is exchanged for the
prompt's sampler meanwhile. Starting latents come from the prompt's seed, so they are the same at
every stage and no global random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lcp_plugin.config.prompts import SamplePrompt
from lcp_plugin.sdxl.sample import sample_images, starting_latents
from lcp_plugin.sdxl.samplers import create_sampler

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]


def texts_of(prompts: Sequence[SamplePrompt]) -> tuple[str, ...]:
    """All texts that must be encoded to draw the prompts, negative ones too."""
    return tuple(dict.fromkeys(t for p in prompts for t in (p.prompt, p.negative_prompt)))


def draw_prompt(
    pipeline: StableDiffusionXLPipeline,
    prompt: SamplePrompt,
    encode: Encode,
    native: int,
    default_sampler: str = "ddim",
    default_seed: int = 42,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
) -> Image:
    """One image of a prompt.

    `encode` gives encoder_hidden_states and text_embeds of texts; `native` is the base's size in
    pixels, for prompts that name none. Sides are cut to multiples of 8, as kohya does.
    """
    height = (prompt.height or native) // 8 * 8
    width = (prompt.width or native) // 8 * 8
    seed = default_seed if prompt.seed is None else prompt.seed
    latents = starting_latents(pipeline, 1, (height, width), seed)
    own = pipeline.scheduler
    pipeline.scheduler = create_sampler(
        prompt.sample_sampler or default_sampler, own, prediction_type, zero_terminal_snr
    )
    try:
        (image,) = sample_images(
            pipeline,
            encode([prompt.prompt]),
            encode([prompt.negative_prompt]),
            latents,
            steps=prompt.sample_steps,
            guidance=prompt.scale,
        )
    finally:
        pipeline.scheduler = own
    return image


def sample_file_name(
    name: str, number: int, seed: int | None, step: int, epoch: int | None, stamp: str
) -> str:
    """kohya's name: <name>_<e000001 | 000100>_<number>_<time>[_<seed>].png."""
    when = f"e{epoch:06d}" if epoch is not None else f"{step:06d}"
    tail = "" if seed is None else f"_{seed}"
    return f"{name}_{when}_{number:02d}_{stamp}{tail}.png"
