"""The live model as strategies see it: predictions under four sets of weights, a task's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Generator, Tensor, nn

from lcp_plugin.hooks import Conditioning, Item, Parameters, Trajectory, Weights
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.trajectory import draw_trajectory, spread_times
from lcp_plugin.tasks import Task, TaskRecord

if TYPE_CHECKING:
    from PIL.Image import Image


class Desk(Protocol):
    """What a run lends to the live model of a task."""

    def sample(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """One image per prompt from the model as it is being trained."""

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The latent sizes of the task's examples, the most frequent first."""

    def generator(self, purpose: str) -> Generator:
        """Derived from (seed, task, purpose)."""

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar."""

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, kept with the task's state."""

    def examples(self) -> Iterator[Mapping[str, Tensor]]:
        """The task's examples once."""


@dataclass
class LiveModel:
    """Implements `hooks.Model`."""

    base: LiveBase
    task: Task
    learned: tuple[TaskRecord, ...]  # what the carried model knows
    desk: Desk
    _trained: nn.Module | None = None  # what gradients go through, once it is prepared

    def train_through(self, wrapped: nn.Module) -> None:
        """From now on gradients go through the model as prepared for several processes."""
        self._trained = wrapped

    @property
    def adapted(self) -> AdaptedUNet:
        """The UNet with what is attached to it."""
        return self.base.adapted

    @property
    def parameters(self) -> Parameters:
        """module -> (A, B) on the device."""
        return {name: (pair.down, pair.up) for name, pair in self.adapted.pair_of.items()}

    @property
    def scales(self) -> Mapping[str, float]:
        """module -> alpha / rank."""
        return {name: pair.scale for name, pair in self.adapted.pair_of.items()}

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        weights: Weights = "trained",
    ) -> Tensor:
        """The UNet's output (b, 4, h, w), fp32; gradients flow for "trained" only."""
        if weights == "trained":
            return self.base.predict(latents, timesteps, conditioning, self._trained)
        with torch.no_grad(), self.adapted.using(weights):
            return self.base.predict(latents, timesteps, conditioning)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents at the timesteps (b,), and the target that the base's type asks for."""
        return self.base.schedule.corrupt(latents, noise, timesteps)

    def sample(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """One image per prompt."""
        return self.desk.sample(prompts, seed)

    def encode_prompts(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> Conditioning:
        """Conditioning of prompts at a latent size (h, w); None: the base's own resolution."""
        return self.base.condition(prompts, size)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The latent sizes (h, w) of this task's examples, the most frequent first."""
        return self.desk.sizes()

    def generator(self, purpose: str) -> Generator:
        """Random numbers for a strategy's own draws, derived from (seed, task, purpose)."""
        return self.desk.generator(purpose)

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar on the console and the time left."""
        return self.desk.progress(items, what)

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, kept on disk with the state of the task."""
        return self.desk.keep(name, make)

    def batches(self) -> Iterator[Mapping[str, Tensor]]:
        """This task's examples once."""
        return self.desk.examples()

    def draw(
        self,
        prompts: str | Sequence[str],
        noise: Tensor,
        steps: int,
        guidance: float,
        generator: Generator,
        weights: Weights = "carry",
    ) -> Trajectory:
        """Draws an image from each noise (n, 4, h, w) in latent space, by one prompt or n of them,
        and keeps every state.
        """
        rows, size = len(noise), (noise.shape[2], noise.shape[3])
        texts = [prompts] * rows if isinstance(prompts, str) else list(prompts)
        with self.adapted.using(weights):  # text encoders have them too
            conditioning = [self._encode_each(of, size) for of in (texts, [""] * rows)]
        schedule = self.base.schedule
        times = spread_times(len(schedule.alphas), steps, rows, generator)
        training = self.adapted.training
        self.adapted.eval()
        with torch.no_grad(), self.adapted.using(weights):
            drawn = draw_trajectory(
                self.base.predict,
                noise.to(self.base.device),
                (conditioning[0], conditioning[1]),
                (schedule.alphas, schedule.prediction_type),
                times,
                guidance,
            )
        self.adapted.train(training)
        return drawn

    def _encode_each(self, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        """A row for each prompt; those that repeat are encoded once."""
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(prompt) for prompt in prompts])
        encoded = self.encode_prompts(unique, size)
        return {key: value[rows.to(value.device)] for key, value in encoded.items()}


@dataclass
class LiveStep:
    """Implements `hooks.Step`: one micro-batch, and after the last of them the whole step."""

    model: LiveModel
    index: int
    total: int
    batch: Mapping[str, Tensor]
    prediction: Tensor
    target: Tensor
    timesteps: Tensor
    generator: Generator
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        """module -> (A, B) on the device."""
        return self.model.parameters

    @property
    def scales(self) -> Mapping[str, float]:
        """module -> alpha / rank."""
        return self.model.scales

    def base_delta(self, name: str) -> Tensor | None:
        """The frozen base delta of a module on the device, (out, in); None where it is zero."""
        return self.model.adapted.base_delta(name)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        weights: Weights = "trained",
    ) -> Tensor:
        """The UNet's output (b, 4, h, w), fp32; gradients flow for "trained" only."""
        return self.model.predict(latents, timesteps, conditioning, weights)
