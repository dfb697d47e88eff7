"""SDXL-class pipelines built from nothing: same classes, wiring and key names as SDXL, any size.

    tiny   the embedded base: 48 px, factor-4 VAE, 12 x 12 x 4 latents, widths (64, 96, 112)
    topo   SDXL's topology at small widths: exactly its 560 attention projections
    toy    for tests: a training step takes milliseconds
    SDXL   its real size: 2,567,463,684 parameters in the UNet, 817,720,320 in the text encoders

SDXL (arXiv 2307.01952): two CLIP text encoders whose penultimate states are concatenated, the
projected pooled state of the second one and six size numbers added to the timestep embedding.
Where tiny differs: v-prediction (arXiv 2202.00512), and cross-attention on its two finer levels
(SDXL: on the two coarser), because its 12 x 12 latents are as coarse as SDXL's deepest level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lcp_plugin.tiny.vocabulary import BOS_ID, EOS_ID, MAX_LENGTH, VOCABULARY_SIZE, tokenizer_dir

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

SCALING_FACTOR = 0.13025  # SDXL's own: latents have a standard deviation of 1 / .13025


@dataclass(frozen=True)
class Architecture:
    """Sizes of one SDXL-class model. Every tuple of three goes from the finest level down."""

    resolution: int  # native, pixels
    widths: tuple[int, int, int]  # UNet channels
    transformer_layers: tuple[int, int, int]  # 0: a level without attention
    heads: tuple[int, int, int]  # UNet attention heads
    norm_groups: int
    text_width: int  # hidden size of the first text encoder
    text_layers: int
    text_head_size: int
    time_id_size: int  # channels of each of the six size embeddings
    vae_widths: tuple[int, ...]  # n levels make a factor of 2 ** (n - 1)
    vae_norm_groups: int
    prediction_type: str = "epsilon"
    second_width: int = 0  # of text encoder 2; 0: as the first
    second_layers: int = 0
    vocabulary: int = VOCABULARY_SIZE  # entries of the text encoders' embeddings
    vae_layers: int = 1  # a block

    @property
    def pooled_width(self) -> int:
        """Hidden size of text encoder 2, whose pooled text is used."""
        return self.second_width or self.text_width

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae_widths) - 1))

    @property
    def latent_size(self) -> int:
        """Latents along one side at the native resolution."""
        return self.resolution // self.vae_factor


TINY = Architecture(
    resolution=48,
    widths=(64, 96, 112),
    transformer_layers=(1, 1, 0),
    heads=(2, 3, 4),
    norm_groups=16,
    text_width=64,
    text_layers=3,
    text_head_size=32,
    time_id_size=32,
    vae_widths=(16, 32, 64),
    vae_norm_groups=4,
    prediction_type="v_prediction",
)
TOPO = Architecture(
    resolution=64,
    widths=(64, 128, 256),
    transformer_layers=(0, 2, 10),
    heads=(1, 2, 4),  # of 64 channels, as in SDXL
    norm_groups=32,
    text_width=64,
    text_layers=2,
    text_head_size=32,
    time_id_size=32,
    vae_widths=(16, 16, 32, 32),
    vae_norm_groups=4,
)
TOY = Architecture(
    resolution=32,
    widths=(16, 32, 32),
    transformer_layers=(0, 1, 1),
    heads=(1, 2, 2),
    norm_groups=8,
    text_width=16,
    text_layers=2,
    text_head_size=8,
    time_id_size=8,
    vae_widths=(8, 8, 8),
    vae_norm_groups=4,
)
SDXL = Architecture(
    resolution=1024,
    widths=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    heads=(5, 10, 20),
    norm_groups=32,
    text_width=768,
    text_layers=12,
    text_head_size=64,
    time_id_size=256,
    vae_widths=(128, 256, 512, 512),
    vae_norm_groups=32,
    second_width=1280,
    second_layers=32,
    vocabulary=49408,  # of which the embedded tokenizer gives the first 2,048
    vae_layers=2,
)
WEIGHT_STD = 0.02  # of weights that are drawn on a device


def build_topo(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL's topology (560 attention projections) with random weights, 64 px."""
    return build_pipeline(TOPO, seed)


def build_toy(seed: int = 0) -> StableDiffusionXLPipeline:
    """The smallest pipeline with SDXL's wiring, random weights, 32 px: for tests."""
    return build_pipeline(TOY, seed)


def build_pipeline(sizes: Architecture, seed: int = 0) -> StableDiffusionXLPipeline:
    """A pipeline with weights drawn from `seed`; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _build_vae(sizes)
        text_encoder = _build_text_encoder(sizes, projected=False)
        text_encoder_2 = _build_text_encoder(sizes, projected=True)
        unet = build_unet(sizes)
    return _assemble(sizes, vae, text_encoder, text_encoder_2, unet)


def draw_pipeline(
    sizes: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A frozen pipeline whose weights are drawn on `device` itself, in seconds even at SDXL's size,
    and which then lies as a loaded one does: the UNet there, all else on the CPU.

    `dtype` of UNet and text encoders; the VAE is in fp32.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parts: list[Any] = []
    for build, kind in (
        (lambda: _build_text_encoder(sizes, projected=False), dtype),
        (lambda: _build_text_encoder(sizes, projected=True), dtype),
        (lambda: _build_vae(sizes), torch.float32),
    ):
        parts.append(_draw(build, device, kind, generator).to("cpu"))
    text_encoder, text_encoder_2, vae = parts
    unet = _draw(lambda: build_unet(sizes), device, dtype, generator)
    pipeline = _assemble(sizes, vae, text_encoder, text_encoder_2, unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _draw(
    build: Callable[[], Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Any:
    """A module without weights, given memory on the device and filled there: norms are the
    identity, biases 0.
    """
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    for layer in module.modules():
        norm = isinstance(layer, nn.GroupNorm | nn.LayerNorm)
        for name, parameter in layer.named_parameters(recurse=False):
            if name == "bias" or norm:
                parameter.fill_(0.0 if name == "bias" else 1.0)
            else:
                parameter.normal_(0.0, WEIGHT_STD, generator=generator)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name  # the only one that the text encoders have
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return module.eval()


def _assemble(
    sizes: Architecture, vae: Any, text_encoder: Any, text_encoder_2: Any, unet: Any
) -> StableDiffusionXLPipeline:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler(  # SDXL's configuration
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=sizes.prediction_type,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=_build_tokenizer("<|endoftext|>"),
        tokenizer_2=_build_tokenizer("!"),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def save_pipeline(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Save in diffusers' layout, weights in fp16, such that transformers 4 and 5 both read it in
    fp32, with their fast and slow tokenizers: weights of text encoder 1 under `text_model.`,
    vocab.json and merges.txt beside tokenizer.json. Leaves the pipeline in fp16.
    """
    import shutil

    pipeline.to(torch.float16)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    _prefix_text_model(folder / "text_encoder" / "model.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        _declare_fp32(folder / name / "config.json")
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizer_dir() / file, folder / name / file)


def _declare_fp32(file: Path) -> None:
    """transformers 5 loads what the configuration declares, diffusers fp32: let them agree."""
    import json

    config = {k: v for k, v in json.loads(file.read_text("utf-8")).items() if k != "torch_dtype"}
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", "utf-8")


def _prefix_text_model(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    prefix = "text_model."
    tensors = {
        key if key.startswith(prefix) else prefix + key: value.contiguous()
        for key, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def _build_tokenizer(pad_token: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(tokenizer_dir()), pad_token=pad_token)


def _build_text_encoder(sizes: Architecture, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = sizes.pooled_width if projected else sizes.text_width
    layers = (sizes.second_layers if projected else 0) or sizes.text_layers
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,  # equal to hidden_size, or from_single_file loses it
        num_hidden_layers=layers,
        num_attention_heads=width // sizes.text_head_size,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=0 if projected else EOS_ID,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _build_vae(sizes: Architecture) -> Any:
    from diffusers import AutoencoderKL

    levels = len(sizes.vae_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_widths,
        layers_per_block=sizes.vae_layers,
        latent_channels=4,
        norm_num_groups=sizes.vae_norm_groups,
        sample_size=sizes.resolution,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    ).eval()


def build_unet(sizes: Architecture) -> Any:
    """The UNet of an architecture, initialised as diffusers does it."""
    from diffusers import UNet2DConditionModel

    depths = sizes.transformer_layers
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths))
    return UNet2DConditionModel(
        sample_size=sizes.latent_size,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=sizes.widths,
        layers_per_block=2,
        transformer_layers_per_block=tuple(max(1, depth) for depth in depths),
        attention_head_dim=sizes.heads,  # diffusers' name for the number of heads
        cross_attention_dim=sizes.text_width + sizes.pooled_width,
        norm_num_groups=sizes.norm_groups,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.time_id_size,
        projection_class_embeddings_input_dim=sizes.pooled_width + 6 * sizes.time_id_size,
    ).eval()
