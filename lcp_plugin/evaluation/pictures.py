"""Images of the model after every task, for scoring: made once, told apart by what made them.

The model is loaded once, and only if something is missing; a boundary is swapped in place
(`LiveBase.show`, always from untouched weights). A picture's name holds the hash of the
weights that made it, its metadata prompt, seed, number and sampling: a file whose metadata fit is
never made again, so an interrupted evaluation goes on, and strategies that share their first task
share its images. Starting latents are the same for every prompt and every stage (arXiv 2410.04891:
eight, generator seed 42).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lcp_plugin.biases import Change
from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.disk import remove_temporary_files
from lcp_plugin.formats.pictures import save_picture
from lcp_plugin.sdxl.base_weights import BaseSource
from lcp_plugin.sdxl.drawing import DrawSettings, starting_latents
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.open_base import open_base
from lcp_plugin.seeds import LARGEST_SEED
from lcp_plugin.telling.wording import counted

BASE = "base"  # stage of the untouched base model
UNIT = 8  # pixels: sides are drawn in multiples of it


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
        """Raises ConfigError for numbers that draw nothing."""
        if self.images < 1 or self.steps < 1:
            images, steps = counted(self.images, "image"), counted(self.steps, "step")
            raise ConfigError(f"{images} in {steps}: both must be >= 1.")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance = {self.guidance}: wanted a finite number.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed = {self.seed}: wanted a whole number, 0 to 2^63 - 1.")
        if self.size is not None and (self.size < UNIT or self.size % UNIT):
            raise ConfigError(f"size = {self.size}: wanted a multiple of {UNIT} pixels.")


@dataclass(frozen=True)
class Stage:
    """A state of the model: W0 + the change that `load` gives."""

    name: str  # "base", "after 03_watercolor"
    weights: str  # what tells its images apart: hash of base and delta
    load: Callable[[], Change] = field(default=Change, compare=False)


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
        self._standing = BASE  # weights that the model stands on

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
            "texts": None if self.base.texts.are_plain else asdict(self.base.texts),
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
        live = self.stand_on(stage)
        latents, how = self._starting_latents(), self._settings()
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            if missing.isdisjoint(batch):
                continue
            drawn = live.draw([p.prompt for p in batch], latents[[p.number for p in batch]], how)
            for picture, image in zip(batch, drawn, strict=True):
                if picture in missing:
                    save_picture(picture.path, image, self.describe(picture, stage))
        self.made += len(missing)
        return len(missing)

    @cached_property
    def live(self) -> LiveBase:
        """The base model, loaded when it is first asked for."""
        return open_base(self.base, torch.device(self.device), self.dtype, self.vae)

    def stand_on(self, stage: Stage) -> LiveBase:
        """The base model with the stage's weights in place."""
        live = self.live
        if self._standing != stage.weights:
            live.show(stage.load(), measure=False)
            self._standing = stage.weights
        return live

    def _settings(self) -> DrawSettings:
        asked = self.sampling
        return DrawSettings(asked.steps, asked.guidance, asked.negative, self.batch_size)

    def _starting_latents(self) -> torch.Tensor:
        side = self.sampling.size or self.live.native_side
        size, pipeline = (side, side), self.live.pipeline
        return starting_latents(pipeline, self.sampling.images, size, self.sampling.seed)
