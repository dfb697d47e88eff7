"""Embeddings cached by image hash, and the scores of image sets that are read off them.

One safetensors file per encoder and weights: a matrix (n, d) and, in its metadata, the n hashes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.errors import FileFormatError
from lcp_plugin.evaluation.encoders import Encoder, TextEncoder
from lcp_plugin.evaluation.images import hash_image
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.scores import mean_cosine
from lcp_plugin.formats.pictures import open_rgb
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors

CHUNK = 64  # images held in memory at once


class EmbeddingCache:
    """Embeddings of one encoder. `folder=None` keeps them in memory only."""

    def __init__(self, encoder: Encoder, folder: Path | None) -> None:
        self.encoder = encoder
        self.computed = 0  # images that were not in the cache
        self._rows: dict[str, Tensor] = {}
        self._hashes: dict[Path, str] = {}
        name = f"{encoder.name}-{encoder.fingerprint[:12]}.safetensors"
        self._file = None if folder is None else folder / name
        if self._file is not None and self._file.is_file():
            self._rows = _read_rows(self._file)

    def embed_files(self, paths: Sequence[Path]) -> Tensor:
        """One embedding per file   # (n, d). DataError for an unreadable image."""
        for start in range(0, len(paths), CHUNK):
            self._fill(paths[start : start + CHUNK])
        return torch.stack([self._rows[self._hashes[path]] for path in paths])

    def save(self) -> None:
        """Writes what is new; nothing to do when nothing is."""
        if self._file is None or not self.computed:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        hashes = sorted(self._rows)
        matrix = torch.stack([self._rows[h] for h in hashes])
        write_tensors(self._file, {"embeddings": matrix}, {"images": json.dumps(hashes)})

    def _fill(self, paths: Sequence[Path]) -> None:
        new: dict[str, Image.Image] = {}
        for path in paths:
            if path in self._hashes:
                continue
            image = open_rgb(path)
            self._hashes[path] = hash_image(image)
            if self._hashes[path] not in self._rows:
                new[self._hashes[path]] = image
        if new:
            rows = self.encoder.embed(list(new.values()))
            self._rows.update(zip(new, rows, strict=True))
            self.computed += len(new)


def _read_rows(file: Path) -> dict[str, Tensor]:
    """A damaged cache is only a cache: it is made again."""
    try:
        hashes = json.loads(read_header(file).metadata["images"])
        matrix = read_tensors(file)["embeddings"].clone()  # the file is written anew: not mapped
        return dict(zip(hashes, matrix, strict=True))
    except (FileFormatError, KeyError, ValueError, TypeError):
        return {}


def score_files(
    metric: Metric,
    cache: EmbeddingCache,
    generated: Sequence[Path],
    references: Sequence[Path],
    prompts: Sequence[str] = (),
) -> float:
    """Mean cosine over all generated x reference pairs; for a metric against the prompt, over all
    images and the prompt of each (`prompts`, one per generated image).
    """
    images = cache.embed_files(generated)
    if not metric.against_prompt:
        return mean_cosine(images.numpy(), cache.embed_files(references).numpy())
    encoder = cache.encoder
    assert isinstance(encoder, TextEncoder)
    distinct = list(dict.fromkeys(prompts))
    rows = dict(zip(distinct, encoder.embed_text(distinct), strict=True))
    texts = torch.stack([rows[prompt] for prompt in prompts])
    return float((images.double() * texts.double()).sum(dim=1).mean())
