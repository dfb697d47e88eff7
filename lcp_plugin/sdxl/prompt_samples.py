"""Samples of a prompt file during training (`sample_prompts`), drawn with kohya's settings.

The live pipeline's UNet, with whatever LoRA is on it, is used; its scheduler is exchanged for the
prompt's sampler meanwhile. Starting latents come from the prompt's seed, so they are the same at
every stage; what an ancestral sampler adds comes from torch's global generator, which the caller
seeds and puts back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcp_plugin.config.prompts import SamplePrompt
from lcp_plugin.sdxl.drawing import DrawSettings, draw_images, starting_latents
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.samplers import create_sampler

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_prompt(
    base: LiveBase, prompt: SamplePrompt, default_sampler: str = "ddim", default_seed: int = 42
) -> Image:
    """One image of a prompt, whose texts become tokens as those of training do.

    Prompts that name no size get the base's own. Sides are cut to multiples of 8, as kohya does.
    """
    pipeline, schedule = base.pipeline, base.schedule
    height = (prompt.height or base.native_side) // 8 * 8
    width = (prompt.width or base.native_side) // 8 * 8
    seed = default_seed if prompt.seed is None else prompt.seed
    latents = starting_latents(pipeline, 1, (height, width), seed)
    own = pipeline.scheduler
    name = prompt.sample_sampler or default_sampler
    pipeline.scheduler = create_sampler(name, own, schedule.prediction_type, schedule.zero_terminal)
    how = DrawSettings(prompt.sample_steps, prompt.scale, prompt.negative_prompt)
    try:
        asked, empty = (base.encode_prompts([text]) for text in (prompt.prompt, how.negative))
        (image,) = draw_images(pipeline, asked, empty, latents, how)
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
