"""The baseline of start-up: a script in the way of diffusers' SDXL LoRA examples, one step long.

    python example_startup.py BASE_FOLDER IMAGE SIDE RANK

Run as a file, it knows nothing of this project. It imports what
examples/text_to_image/train_text_to_image_lora_sdxl.py of huggingface/diffusers imports at its top,
but for `datasets` and `torchvision`, which would make it slower; loads each part of the base, adds
a LoRA by peft, and takes one step as `example_style` does. It prints its CPU seconds as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(base: str, image: str, side: int, rank: int) -> None:
    """From nothing to the end of step 1."""
    import_what_the_example_does()
    import torch
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler

    accelerator = Accelerator()
    tokenizers, encoders, scheduler, vae, unet = load_base(base)
    parameters = add_lora(unet, rank)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rates = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)

    latents = encode_image(vae, image, side)
    states, pooled = encode_text(tokenizers, encoders, "a photo of a sks disc")
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (1,))
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    predicted = unet(
        scheduler.add_noise(latents, noise, timesteps),
        timesteps,
        states,
        added_cond_kwargs={"time_ids": sizes, "text_embeds": pooled},
        return_dict=False,
    )[0]
    loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    print(json.dumps({"cpu": time.process_time(), "ended": time.time()}))


def import_what_the_example_does() -> None:
    """The names that the example imports at its top, used here or not."""
    import torch.nn.functional  # noqa: F401
    from diffusers import StableDiffusionXLPipeline  # noqa: F401
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # noqa: F401
    from diffusers.training_utils import cast_training_params, compute_snr  # noqa: F401
    from diffusers.utils.hub_utils import load_or_create_model_card  # noqa: F401
    from huggingface_hub import create_repo  # noqa: F401
    from peft import LoraConfig, set_peft_model_state_dict  # noqa: F401
    from PIL import Image  # noqa: F401
    from transformers import AutoTokenizer, CLIPTextModelWithProjection  # noqa: F401


def load_base(base: str) -> tuple[list[Any], list[Any], Any, Any, Any]:
    """Tokenizers, text encoders, noise schedule, VAE and UNet of a folder, frozen."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    tokenizers = [AutoTokenizer.from_pretrained(f"{base}/tokenizer{i}") for i in ("", "_2")]
    encoders: list[Any] = [
        CLIPTextModel.from_pretrained(f"{base}/text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(f"{base}/text_encoder_2"),
    ]
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for model in (vae, unet, *encoders):
        model.requires_grad_(False)
    return tokenizers, encoders, scheduler, vae, unet


def add_lora(unet: Any, rank: int) -> list[Any]:
    """peft's adapter on the attention layers; its parameters."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    )
    return [p for p in unet.parameters() if p.requires_grad]


def encode_image(vae: Any, image: str, side: int) -> Any:
    """Scaled latents of one image   # (1, 4, h / f, w / f)."""
    import numpy
    import torch
    from PIL import Image

    picture = Image.open(image).convert("RGB").resize((side, side))
    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor


def encode_text(tokenizers: list[Any], encoders: list[Any], caption: str) -> tuple[Any, Any]:
    """Both encoders' penultimate states side by side, and the second one's pooled text."""
    import torch

    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(
            [caption],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
