"""Images of the model after every task, for scoring: made once, told apart by what made them.

The model is loaded once, and only if something is missing; a boundary is swapped in place
(`AdaptedUNet.set_base`, always from untouched weights). A picture's name holds the hash of the
weights that made it, its metadata prompt, seed, number and sampling: a file whose metadata fit is
never made again, so an interrupted evaluation goes on, and strategies that share their first task
share its images. Starting latents are the same for every prompt and every stage (arXiv 2410.04891:
eight, generator seed 42).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lcp_plugin.delta import Delta
from lcp_plugin.formats.disk import remove_temporary_files
from lcp_plugin.formats.pictures import save_picture
from lcp_plugin.sdxl.base_weights import BaseSource, add_to_base, check_source, sum_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
    from lcp_plugin.sdxl.conditioning import PromptBank

logger = logging.getLogger(__name__)
BASE = "base"  # stage of the untouched base model


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; the defaults are the paper's."""

    images: int = 8  # per prompt
    steps: int = 50
    guidance: float = 5.0
    seed: int = 42  # of the starting latents
    size: int | None = None  # pixels per side; None: the base's own
    negative: str = ""

    def __post_init__(self) -> None:
        if self.images < 1 or self.steps < 1:
            raise ValueError(f"{self.images} images in {self.steps} steps: both must be >= 1")


@dataclass(frozen=True)
class Stage:
    """A state of the model: W0 + the delta that `load` gives."""

    name: str  # "base", "after 03_watercolor"
    weights: str  # what tells its images apart: hash of base and delta
    load: Callable[[], Delta] = field(default=Delta, compare=False)


@dataclass(frozen=True)
class Picture:
    """One image: what it shows, from which starting latent, and where it lies."""

    path: Path
    prompt: str
    number: int  # of the starting latent


def name_weights(base_hash: str, delta_hash: str) -> str:
    """12 digits for a folder of images; `base-...` for the base itself."""
    return f"base-{base_hash[:12]}" if not delta_hash else f"{base_hash[:4]}{delta_hash[:12]}"


def plan_pictures(
    folder: Path, stage: Stage, task: str, prompts: Sequence[str], sampling: Sampling
) -> list[Picture]:
    """The images of one cell: every prompt with every starting latent."""
    cell = folder / stage.weights / task
    return [
        Picture(cell / f"p{p:02d}_{n:02d}.png", prompt, n)
        for p, prompt in enumerate(prompts)
        for n in range(sampling.images)
    ]


def describe_picture(picture: Picture, stage: Stage, sampling: Sampling) -> dict[str, str]:
    """The PNG's text: all that decides what the picture shows. The number of images does not."""
    facts = {k: v for k, v in asdict(sampling).items() if k != "images"}
    return {
        "prompt": picture.prompt,
        "number": str(picture.number),
        "weights": stage.weights,
        "sampling": json.dumps(facts, sort_keys=True),
    }


def is_made(picture: Picture, facts: Mapping[str, str]) -> bool:
    """Whether the file is there, whole, and made from the same facts."""
    try:
        with Image.open(picture.path) as image:
            image.load()
            text: Mapping[str, Any] = getattr(image, "text", {})
            return all(text.get(key, "") == value for key, value in facts.items())
    except (OSError, ValueError, SyntaxError):
        return False


def set_schedule(pipeline: StableDiffusionXLPipeline, base: BaseSource) -> None:
    """The noise schedule that the run trained under, where it is not the base's own."""
    from lcp_plugin.sdxl.load import prediction_type, without_zero_terminal
    from lcp_plugin.sdxl.samplers import create_sampler

    if base.v_prediction:
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    if base.zero_terminal_snr:
        kind = prediction_type(pipeline)
        pipeline.scheduler = create_sampler(
            "euler", pipeline.scheduler, kind, zero_terminal_snr=True
        )
    elif base.zero_terminal_snr is False:
        without_zero_terminal(pipeline)


class Studio:
    """Makes the missing images of any stage. `made` counts them."""

    def __init__(
        self,
        base: BaseSource | str,
        sampling: Sampling,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        vae: str | None = None,
    ) -> None:
        self.base = BaseSource(base) if isinstance(base, str) else base
        self.sampling, self.device, self.dtype = sampling, device, dtype
        self.batch_size, self.vae, self.made = batch_size, vae or self.base.vae, 0
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._model: AdaptedUNet | None = None
        self._standing = BASE  # weights that the model stands on
        self._changes_text = False

    def missing(self, stage: Stage, pictures: Sequence[Picture]) -> list[Picture]:
        """Those that are not on disk as they should be."""
        return [p for p in pictures if not is_made(p, self.describe(p, stage))]

    def describe(self, picture: Picture, stage: Stage) -> dict[str, str]:
        """The PNG's text: `describe_picture`, and what of the model is not the base's own."""
        unusual = {
            "dtype": None if self.dtype is torch.float32 else str(self.dtype),
            "vae": self.vae or None,
            "v_prediction": self.base.v_prediction or None,
            "zero_terminal_snr": self.base.zero_terminal_snr,
        }
        told = {key: value for key, value in unusual.items() if value is not None}
        facts = describe_picture(picture, stage, self.sampling)
        return facts | {"model": json.dumps(told, sort_keys=True) if told else ""}

    def make(self, stage: Stage, pictures: Sequence[Picture]) -> int:
        """Makes what is missing, a batch at a time, each image saved at once; how many.

        The batches are those of all `pictures`, made or not: the last bit of an image depends on
        its place in a batch, so that an evaluation that was stopped inside one draws that batch
        again, saves what is missing, and ends with the images of an unbroken one.
        """
        for folder in {picture.path.parent for picture in pictures}:
            remove_temporary_files(folder)  # of whole cells too: a kill may fall after the last
        missing = set(self.missing(stage, pictures))
        if not missing:
            return 0
        pipeline, bank = self.stand_on(stage)
        batches = [
            pictures[start : start + self.batch_size]
            for start in range(0, len(pictures), self.batch_size)
        ]
        latents = self._starting_latents()
        for batch in batches:
            if missing.isdisjoint(batch):
                continue
            for prompt in (*(p.prompt for p in batch), self.sampling.negative):
                bank.add(pipeline, [prompt])  # alone: its last bit depends on its company
            for picture, image in zip(batch, self._draw(batch, bank, latents), strict=True):
                if picture in missing:
                    save_picture(picture.path, image, self.describe(picture, stage))
        self.made += len(missing)
        return len(missing)

    def _draw(
        self, batch: Sequence[Picture], bank: PromptBank, latents: torch.Tensor
    ) -> list[Image.Image]:
        from lcp_plugin.sdxl.drawing import Guidance, draw_images

        sampling = self.sampling
        toward, away = bank([p.prompt for p in batch]), bank([sampling.negative])
        return draw_images(
            self.pipeline(),
            Guidance(toward, away, sampling.guidance),
            latents[[p.number for p in batch]],
            sampling.steps,
            self.batch_size,
        )

    def pipeline(self) -> StableDiffusionXLPipeline:
        """The base model, loaded at the first call."""
        if self._pipeline is None:
            from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
            from lcp_plugin.sdxl.conditioning import PromptBank
            from lcp_plugin.sdxl.load import load_pipeline

            check_source(self.base)
            logger.info("loading %s", self.base.name)
            self._pipeline = load_pipeline(self.base.model, self.dtype, self.vae)
            set_schedule(self._pipeline, self.base)
            self._pipeline.to(self.device)
            self._model = AdaptedUNet(
                {
                    "unet": self._pipeline.unet,
                    "text_encoder": self._pipeline.text_encoder,
                    "text_encoder_2": self._pipeline.text_encoder_2,
                }
            )
            parts = [(Path(path), weight) for path, weight, _ in self.base.added]
            fuse = self.dtype is torch.float32
            add_to_base(self._model.layers, sum_weights(parts), fuse)
            self._bank = PromptBank()
        return self._pipeline

    def stand_on(self, stage: Stage) -> tuple[StableDiffusionXLPipeline, PromptBank]:
        """The pipeline with the stage's weights in place, and the prompts encoded under them."""
        pipeline = self.pipeline()
        assert self._model is not None
        if self._standing != stage.weights:
            delta = stage.load()
            self._model.set_base(delta, measure=False)
            changes_text = any(name.startswith("text_encoder") for name in delta)
            if changes_text or self._changes_text:
                self._bank.clear()
            self._standing, self._changes_text = stage.weights, changes_text
        return pipeline, self._bank

    def _starting_latents(self) -> torch.Tensor:
        from lcp_plugin.sdxl.drawing import starting_latents
        from lcp_plugin.sdxl.load import native_resolution

        pipeline = self.pipeline()
        side = self.sampling.size or native_resolution(pipeline)
        return starting_latents(pipeline, self.sampling.images, (side, side), self.sampling.seed)
