"""Image encoders behind one interface, and where the files of a network are found.

A score is the mean cosine over all generated x reference pairs, or over images and the prompt of
each. `metrics` has the networks and the metrics that there are.
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

from lcp_plugin.errors import EncoderError
from lcp_plugin.evaluation.images import Preprocessing, stack_images

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
class EncoderFiles:
    """Files of one encoder on this machine."""

    name: str
    weights: Path
    others: Mapping[str, Path] = field(default_factory=dict)  # config.json, vocab.json, ...


@dataclass(frozen=True)
class Network:
    """An encoder's network: how it is loaded, and where its weights come from."""

    name: str
    load: Callable[[EncoderFiles, str], Encoder]  # files, device
    repository: str = ""  # on the hub
    files: tuple[str, ...] = ()  # beside the weights
    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")  # the first that is there
    origin: str = ""  # in words, of what is not on the hub
    find_package: Callable[[], Path | None] | None = None  # weights that an installation brings


def find_files(network: Network, path: str | None) -> EncoderFiles:
    """The files of a network; a given path comes before packages and the hub.

    Raises:
        FileFormatError: weights missing; the message says which file goes where.
    """
    if path is not None:
        return _find_given(network, Path(path).expanduser())
    if network.find_package is not None:
        installed = network.find_package()
        if installed is None:
            raise EncoderError(_missing(network, "the package is not installed"))
        return EncoderFiles(network.name, installed)
    if not network.repository:
        raise EncoderError(_missing(network, "no path was given"))
    return _find_on_hub(network)


def _find_given(network: Network, path: Path) -> EncoderFiles:
    if path.is_file():
        beside = {f: path.parent / f for f in network.files}
        return EncoderFiles(network.name, path, {f: p for f, p in beside.items() if p.is_file()})
    if not path.is_dir():
        raise EncoderError(_missing(network, f"{path} does not exist"))
    candidates = [path / file for file in network.weights]
    candidates += sorted(path.glob("*.pth")) + sorted(path.glob("*.safetensors"))
    weights = next((c for c in candidates if c.is_file()), None)
    if weights is None:
        raise EncoderError(_missing(network, f"{path} holds no weights"))
    return _find_given(network, weights)


def _find_on_hub(network: Network) -> EncoderFiles:
    """From the hub's cache, without a request, else from the hub itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(file: str, local: bool) -> Path:
        return Path(hf_hub_download(network.repository, file, local_files_only=local))

    reason = ""
    for local, file in [(local, f) for local in (True, False) for f in network.weights]:
        try:
            weights = fetch(file, local)
            others = {f: fetch(f, local) for f in network.files}
            return EncoderFiles(network.name, weights, others)
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = type(error).__name__
            if not local and isinstance(error, LocalEntryNotFoundError):
                break  # no network: the other file is not to be had either
    reason = f"nothing in the hub's cache, and no download: {reason}"
    raise EncoderError(_missing(network, reason))


def _missing(network: Network, reason: str) -> str:
    if network.find_package is not None:
        return f"encoder '{network.name}': {reason}. Name no file, and install {network.origin}."
    return f"encoder '{network.name}': {reason}. {advise(network)}"


def advise(network: Network) -> str:
    """Which files make an encoder's folder."""
    files = " or ".join(network.weights)
    beside = f" with {', '.join(network.files)} beside it" if network.files else ""
    origin = f"{network.repository} on the hub" if network.repository else network.origin
    return (
        f"Put {files}{beside} of {origin} into a folder and give it "
        f"as --encoder {network.name}=FOLDER."
    )
