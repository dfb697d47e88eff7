"""SDXL's conditioning (arXiv 2307.01952): two text encoders, pooled text, size and crop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def encode_prompts(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], batch_size: int = 16
) -> dict[str, Tensor]:
    """Both encoders' penultimate layers side by side and encoder 2's pooled text.

    Returns:
        encoder_hidden_states (n, 77, c1 + c2) and text_embeds (n, d), fp32 on the encoders' device
    """
    states, pooled = [], []
    for i in range(0, len(prompts), batch_size):
        embeds, _, text, _ = pipeline.encode_prompt(
            prompt=list(prompts[i : i + batch_size]),
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        states.append(embeds.float())
        pooled.append(text.float())
    return {"encoder_hidden_states": torch.cat(states), "text_embeds": torch.cat(pooled)}


def make_time_ids(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
) -> Tensor:
    """Original size, crop's corner and target size, each (height, width)   # (1, 6), fp32."""
    return torch.tensor([[*original, *crop, *target]], dtype=torch.float32)


class PromptBank:
    """Encoded prompts by text, so that text encoders may leave memory after a run has begun.

    Each is encoded alone: a row's last bits depend on what else is in its batch, and a run that was
    killed meets other prompts together than one that was not.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Tensor]] = {}

    def add(
        self, encode: Callable[[Sequence[str]], Mapping[str, Tensor]], prompts: Iterable[str]
    ) -> None:
        """Encodes what is not yet known; kept on the CPU."""
        for prompt in sorted(set(prompts) - self._known.keys()):
            with torch.no_grad():
                self._known[prompt] = {k: v.cpu() for k, v in encode([prompt]).items()}

    def clear(self) -> None:
        """Forgets all: the text encoders have changed."""
        self._known.clear()

    def __call__(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """The conditioning of known prompts, as `encode_prompts` gives it."""
        rows = [self._known[prompt] for prompt in prompts]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
