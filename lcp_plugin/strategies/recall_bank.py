"""What is drawn to be rehearsed: all states x_s of an image on its way from noise, their times s,
and what the model that drew it predicted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lcp_plugin.hooks import Conditioning, Model, Weights

LARGEST_DRAWING = 4  # images drawn at once
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Drawing:
    """What is drawn of one task, or of the base."""

    name: str  # tells its random numbers and its file apart
    prompts: Sequence[str]  # one for each image
    weights: Weights  # of the model that draws


@dataclass(frozen=True)
class Bank:
    """What is rehearsed of one task, or of the base, at one latent size."""

    prompts: tuple[str, ...]
    conditioning: Conditioning  # a row for each prompt
    of_prompt: Tensor  # (n,): which of them a state was drawn from
    latents: Tensor  # (n, 4, h, w), fp16
    timesteps: Tensor  # (n,)
    predictions: Tensor  # (n, 4, h, w), fp16

    def tell(self, place: int) -> tuple[str, Conditioning]:
        """The prompt of a state, and its row of conditioning."""
        row = int(self.of_prompt[place])
        return self.prompts[row], {key: value[row] for key, value in self.conditioning.items()}


def draw_states(
    model: Model,
    drawing: Drawing,
    size: tuple[int, int],
    sampling: tuple[int, float],  # steps, guidance
    generator: Generator,
) -> dict[str, Tensor]:
    """An image for each prompt, every state of it."""
    steps, guidance = sampling
    unique = list(dict.fromkeys(drawing.prompts))
    parts: dict[str, list[Tensor]] = {}
    for begin in range(0, len(drawing.prompts), LARGEST_DRAWING):
        prompts = drawing.prompts[begin : begin + LARGEST_DRAWING]
        noise = torch.randn((len(prompts), LATENT_CHANNELS, *size), generator=generator)
        drawn = model.draw(prompts, noise, steps, guidance, generator, drawing.weights)
        numbers = torch.tensor([unique.index(prompt) for prompt in prompts])
        found = {
            "latents": drawn.latents.half(),
            "predictions": drawn.predictions.half(),
            "timesteps": drawn.timesteps,
            "of_prompt": numbers.repeat(steps),
        }
        for key, value in found.items():
            parts.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}


def choose_state(banks: Sequence[Bank], generator: Generator) -> tuple[Bank, int]:
    """A state of any bank: all banks alike, all states of a bank alike."""
    bank = banks[int(torch.randint(len(banks), (), generator=generator))]
    return bank, int(torch.randint(len(bank.timesteps), (), generator=generator))
