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
    import numpy
    import torch
    import torch.nn.functional as functional
    from accelerate import Accelerator
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params, compute_snr
    from diffusers.utils.hub_utils import load_or_create_model_card
    from huggingface_hub import create_repo
    from peft import LoraConfig, set_peft_model_state_dict
    from PIL import Image
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    imported_by_the_example = (
        StableDiffusionXLPipeline,
        StableDiffusionLoraLoaderMixin,
        cast_training_params,
        compute_snr,
        load_or_create_model_card,
        create_repo,
        set_peft_model_state_dict,
    )
    assert all(imported_by_the_example)
    accelerator = Accelerator()
    read: dict[str, Any] = {"pretrained_model_name_or_path": base}
    tokenizers = [AutoTokenizer.from_pretrained(f"{base}/tokenizer{i}") for i in ("", "_2")]
    encoders = [
        CLIPTextModel.from_pretrained(f"{base}/text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(f"{base}/text_encoder_2"),
    ]
    scheduler = DDPMScheduler.from_pretrained(**read, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(**read, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(**read, subfolder="unet")
    for model in (vae, unet, *encoders):
        model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rates = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)

    picture = Image.open(image).convert("RGB").resize((side, side))
    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        states = []
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            length = tokenizer.model_max_length
            ids = tokenizer(
                ["a photo of a sks disc"],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (1,))
    predicted = unet(
        scheduler.add_noise(latents, noise, timesteps),
        timesteps,
        torch.cat(states, dim=-1),
        added_cond_kwargs={
            "time_ids": torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32),
            "text_embeds": output[0],
        },
        return_dict=False,
    )[0]
    loss = functional.mse_loss(predicted.float(), noise.float())
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    print(json.dumps({"cpu": time.process_time(), "ended": time.time()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
