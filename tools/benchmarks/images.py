"""Images a second of the evaluation, against one image at a time by a plain pipeline call.

Both make the same pictures from the same starting latents and save them; ours encodes each prompt
once and draws eight at a time.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Row, alternate, peak_mb, row_of
from lcp_plugin.evaluation.pictures import Sampling, Stage, Studio, plan_pictures
from lcp_plugin.sdxl.drawing import starting_latents
from lcp_plugin.sdxl.load import load_pipeline

AMOUNTS = {"tiny": (8, 10), "topo": (4, 4)}  # images a prompt, steps
PROMPTS = ("a sks robot in a jail", "a sks robot wearing a santa hat")


def measure_images(size: str, rounds: int = 2) -> list[Row]:
    """Row: seconds for all images of two prompts; none at SDXL's size, which needs real weights."""
    if size == "sdxl":
        return []
    images, steps = AMOUNTS[size]
    sampling = Sampling(images=images, steps=steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = "tiny-sdxl" if size == "tiny" else str(save_topo(folder / "topo"))
        studio, pipeline = Studio(base, sampling), load_pipeline(base)
        side = studio.live.native_side  # loaded ahead of the clock
        latents = starting_latents(pipeline, images, (side, side), sampling.seed)
        stage, fresh = Stage("base", "base"), itertools.count()

        def ours() -> None:
            pictures = plan_pictures(folder / f"ours{next(fresh)}", stage, "x", PROMPTS, sampling)
            studio.make(stage, pictures)

        def one_by_one() -> None:
            for number, prompt in itertools.product(range(images), PROMPTS):
                image = pipeline(
                    prompt=prompt,
                    latents=latents[number : number + 1].clone(),
                    num_inference_steps=steps,
                    guidance_scale=sampling.guidance,
                    height=side,
                    width=side,
                ).images[0]
                image.save(folder / f"{PROMPTS.index(prompt)}_{number}.png")

        with torch.no_grad():
            mine, theirs = alternate(ours, one_by_one, rounds)
    count = images * len(PROMPTS)
    note = f"{count} images of {side} px in {steps} steps; a pipeline call for each"
    return [row_of(f"evaluation images, {size}", mine, theirs, note=note, peak_mb=peak_mb())]


def save_topo(folder: Path) -> Path:
    """SDXL's topology at widths 64, 128, 256, as a diffusers folder."""
    from lcp_plugin.sdxl.load import hush_libraries
    from lcp_plugin.tiny.architecture import build_topo, save_pipeline

    hush_libraries()
    save_pipeline(build_topo(), folder)
    return folder
