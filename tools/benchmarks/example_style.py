"""The baseline of a training step: SDXL LoRA as diffusers' example scripts train it, written anew.

peft's `add_adapter`, torch's default AdamW, and in every step the image decoded, encoded by the VAE
and the caption by both text encoders (examples/text_to_image/train_text_to_image_lora_sdxl.py of
huggingface/diffusers, its defaults). So that losses can be compared, the VAE's mean is taken, not a
sample, and noise and timesteps come from a given generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHT_DECAY = 1e-2  # torch's default and the example's


@dataclass(frozen=True)
class CaptionedImage:
    """All that is trained on."""

    path: Path
    caption: str
    side: int  # pixels to which it is resized


class ExampleStyle:
    """A model in training; `step` is one whole optimizer step of batch size 1."""

    def __init__(
        self,
        pipeline: Any,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        learning_rate: float,
        image: CaptionedImage,
        caches_text: bool = False,
    ) -> None:
        """`factors`: module (`unet....`) -> (A, B) to start from, all of one rank."""
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        self.pipeline, self.image = pipeline, image
        unet, rank = pipeline.unet, len(next(iter(factors.values()))[0])
        for model in (unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            model.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
            )
        )
        set_factors(unet, factors)
        unet.train()
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY, eps=1e-8
        )
        rates = get_scheduler("constant", optimizer=optimizer)
        self.accelerator = Accelerator()
        self.unet, self.optimizer, self.rates = self.accelerator.prepare(unet, optimizer, rates)
        self.text = self.encode_text([image.caption]) if caches_text else None

    def step(self, generator: torch.Generator) -> float:
        """One step; noise and timestep are drawn from `generator`. Returns the loss."""
        pixels = read_pixels(self.image.path, self.image.side)[None]
        with self.accelerator.accumulate(self.unet):
            latents = self.encode_pixels(pixels)
            noise = torch.randn(latents.shape, generator=generator)
            count = self.scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, count, (len(latents),), generator=generator)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            states, pooled = self.text or self.encode_text([self.image.caption])
            side = self.image.side
            sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
            predicted = self.unet(
                noisy,
                timesteps,
                states,
                added_cond_kwargs={"time_ids": sizes, "text_embeds": pooled},
                return_dict=False,
            )[0]
            target = noise
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(latents, noise, timesteps)
            loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
            gathered = self.accelerator.gather(loss.repeat(1)).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        return float(gathered)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Scaled latents (1, 4, h / f, w / f)."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Both encoders' penultimate states side by side, and the second one's pooled text."""
        pipeline, states = self.pipeline, []
        pooled = torch.empty(0)
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            ids = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(states, dim=-1), pooled


def set_factors(unet: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """peft's parameters <- A and B of every module of ours."""
    seen = set()
    with torch.no_grad():
        for name, module in unet.named_modules():
            if f"unet.{name}" in factors and hasattr(module, "lora_A"):
                down, up = factors[f"unet.{name}"]
                module.lora_A["default"].weight.copy_(down)
                module.lora_B["default"].weight.copy_(up)
                seen.add(f"unet.{name}")
    if seen != set(factors):
        raise RuntimeError(f"peft adapts other layers: {sorted(set(factors) ^ seen)[:3]}")


def read_pixels(path: Path, side: int) -> Tensor:
    """An image as the example's transforms give it   # (3, side, side) in [-1, 1]."""
    import numpy
    from PIL import Image

    with Image.open(path) as file:
        picture = file.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    values = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 255
    return values * 2 - 1
