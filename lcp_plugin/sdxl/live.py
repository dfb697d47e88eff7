"""The live model as strategies see it: predictions under four sets of weights, samples, this
task's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from lcp_plugin.hooks import Conditioning, Parameters, Weights
from lcp_plugin.sdxl.layers import AdaptedUNet
from lcp_plugin.sdxl.noise import add_noise, make_target

if TYPE_CHECKING:
    from PIL.Image import Image


def run_unet(
    unet: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> Tensor:
    """The UNet's output in fp32 for noisy latents (b, 4, h, w), timesteps (b,) and its
    conditioning.

    Args:
        conditioning: encoder_hidden_states (b, tokens, c), text_embeds (b, d), time_ids (b, 6).
        dtype: of the UNet's weights; inputs are cast to it.
    """
    output = unet(
        latents.to(dtype),
        timesteps,
        encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
        added_cond_kwargs={
            "text_embeds": conditioning["text_embeds"].to(dtype),
            "time_ids": conditioning["time_ids"].to(dtype),
        },
        return_dict=False,
    )[0]
    return torch.as_tensor(output).float()


@dataclass
class LiveModel:
    """Implements `hooks.Model`."""

    adapted: AdaptedUNet
    dtype: torch.dtype  # of the base's weights
    device: torch.device
    autocast: Callable[[], Any]
    alphas: Tensor  # cumulative products of the noise schedule, (train timesteps,)
    prediction_type: str  # epsilon | v_prediction
    wrapped: Any = None  # the module as prepared for several processes; trains through it
    sampler: Callable[[Sequence[str], int], list[Image]] | None = None
    encoder: Callable[[Sequence[str]], Mapping[str, Tensor]] | None = None
    loader: Callable[[], Iterator[Mapping[str, Tensor]]] | None = None

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
            unet = self.wrapped if self.wrapped is not None else self.adapted
            with self.autocast():
                return run_unet(unet, latents, timesteps, conditioning, self.dtype)
        with torch.no_grad(), self.adapted.using(weights), self.autocast():
            return run_unet(self.adapted, latents, timesteps, conditioning, self.dtype)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents at the timesteps (b,), and the target that the base's type asks for."""
        noisy = add_noise(latents, noise, timesteps, self.alphas)
        return noisy, make_target(latents, noise, timesteps, self.alphas, self.prediction_type)

    def sample(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """One image per prompt."""
        assert self.sampler is not None
        return self.sampler(prompts, seed)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts at the run's resolution."""
        assert self.encoder is not None
        return self.encoder(prompts)

    def batches(self) -> Iterator[Mapping[str, Tensor]]:
        """This task's examples once."""
        assert self.loader is not None
        return self.loader()


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
        """As `LiveModel.predict`."""
        return self.model.predict(latents, timesteps, conditioning, weights)
