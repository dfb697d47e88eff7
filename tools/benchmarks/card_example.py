"""The baseline on a card: SDXL LoRA in bf16 as diffusers' example trains it, written anew.

peft's adapter, accelerate's autocast, bitsandbytes' AdamW8bit: what
examples/text_to_image/train_text_to_image_lora_sdxl.py of huggingface/diffusers does with
--mixed_precision bf16 --use_8bit_adam. Latents and text are cached, which that script does not do,
so that both sides do the same work. Noise is drawn on the device, as there. The script leaves its
factors in bf16 (it casts them under fp16 alone); fp32 ones, as ours, are a baseline too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.example_style import WEIGHT_DECAY, set_factors


class ExampleOnCard:
    """A UNet in training; `step` is one whole optimizer step of batch size 1."""

    def __init__(
        self,
        pipeline: Any,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        batch: Mapping[str, Tensor],
        learning_rate: float,
        checkpointing: bool,
        in_fp32: bool = True,
    ) -> None:
        """`factors`: module (`unet....`) -> (A, B) to start from, trained in fp32 or in bf16;
        `batch`: latents, conditioning, on the device.
        """
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import cast_training_params

        unet = pipeline.unet
        adapt(unet, factors)
        if in_fp32:
            cast_training_params(unet, dtype=torch.float32)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        self.batch = batch
        self.dtype = torch.bfloat16
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, learning_rate)
        rates = get_scheduler("constant", optimizer=optimizer)
        self.accelerator = Accelerator(mixed_precision="bf16")
        self.unet, self.optimizer, self.rates = self.accelerator.prepare(unet, optimizer, rates)

    def step(self, generator: torch.Generator | None = None) -> float:
        """One step; its loss. `generator`: noise and timestep as our trainer draws them."""
        with self.accelerator.accumulate(self.unet):
            latents = self.batch["latents"].to(self.dtype)
            noise, timesteps = self._draw(latents, generator)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            predicted = self.unet(
                noisy,
                timesteps,
                self.batch["encoder_hidden_states"],
                added_cond_kwargs={
                    "time_ids": self.batch["time_ids"],
                    "text_embeds": self.batch["text_embeds"],
                },
                return_dict=False,
            )[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            gathered = self.accelerator.gather(loss.repeat(1)).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        return float(gathered)

    def _draw(self, latents: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        count = int(self.scheduler.config.num_train_timesteps)
        if generator is None:
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
            return noise, timesteps.long()
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, count, (len(latents),), generator=generator)
        return noise.to(latents), timesteps.to(latents.device)


def adapt(unet: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """peft's adapter on the named modules (added once), at the factors given."""
    from peft import LoraConfig

    if not getattr(unet, "peft_config", None):
        rank = len(next(iter(factors.values()))[0])
        names = [name.removeprefix("unet.") for name in factors]
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names)
        )
    set_factors(unet, factors)


def make_optimizer(parameters: list[torch.nn.Parameter], learning_rate: float) -> Any:
    """The example's AdamW8bit with its defaults."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, eps=1e-8
    )
