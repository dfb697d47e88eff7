"""SDXL's UNet at its real size with random weights, as a base on disk, built without a download.

    python -m benchmarks.parts build_base FOLDER

2,567,463,684 parameters in bf16 (arXiv 2307.01952; the configuration that diffusers publishes). The
text encoders have SDXL's widths and two layers each, the VAE its factor of 8 at small widths: what
is cached before training costs little here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcp_plugin.config.estimates import UNET_PARAMETERS
from lcp_plugin.sdxl.load import hush_libraries
from lcp_plugin.tiny import architecture
from lcp_plugin.tiny.vocabulary import (
    BOS_ID,
    EOS_ID,
    MAX_LENGTH,
    VOCABULARY_SIZE,
    tokenizer_dir,
)

STD = 0.02  # of the random weights


def build_base(folder: str, seed: str = "0") -> None:
    """A part: writes the base in diffusers' layout (5.3 GB)."""
    hush_libraries()
    torch.manual_seed(int(seed))
    build_pipeline().save_pretrained(Path(folder), safe_serialization=True)


def build_pipeline(device: str = "cpu") -> Any:
    """The whole base, its UNet made on `device`; everything else on the CPU."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    tokenizers = [
        CLIPTokenizer.from_pretrained(str(tokenizer_dir()), pad_token=token)
        for token in ("<|endoftext|>", "!")
    ]
    return StableDiffusionXLPipeline(
        vae=_build_vae(),
        text_encoder=_build_text_encoder(768, projected=False),
        text_encoder_2=_build_text_encoder(1280, projected=True),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=build_unet(device),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def build_unet(device: str = "cpu") -> Any:
    """The UNet in bf16 on a device, its weights copied from one random pool."""
    with torch.device("meta"):
        unet: Any = architecture.build_unet(architecture.SDXL)
    count = sum(p.numel() for p in unet.parameters())
    assert count == UNET_PARAMETERS, f"{count} parameters, SDXL has {UNET_PARAMETERS}"
    unet = unet.to(torch.bfloat16).to_empty(device=device)
    fill_weights(unet)
    return unet.eval()


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Weights of a model without any, on its device, in its type, from one random pool."""
    like = next(model.parameters())
    pool = (torch.randn(1 << 22) * STD).to(like)
    for module in model.modules():
        _fill(module, pool)


def _fill(module: nn.Module, pool: torch.Tensor) -> None:
    """Weights from the pool; norms are the identity, biases 0."""
    norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
    for name, parameter in module.named_parameters(recurse=False):
        if name == "weight" and not norm:
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), len(pool)):
                part = flat[start : start + len(pool)]
                part.copy_(pool[: len(part)])
        else:
            parameter.fill_(1.0 if name == "weight" else 0.0)


def _build_text_encoder(width: int, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=0 if projected else EOS_ID,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _build_vae() -> Any:
    from diffusers import AutoencoderKL

    widths = (16, 16, 32, 32)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.13025,
    ).eval()
