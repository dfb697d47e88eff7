"""Encoded images and captions on disk, named by everything that they depend on.

A file's name is the sha256 of its key: for latents the VAE, the image's bytes, the bucket and the
crop; for captions the text encoders (with what they carry) and the text. So an edited image,
another resolution or another VAE never meets an old file. NaN is refused at writing and at reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.formats.tensors import read_tensors, write_tensors


def make_key(*parts: object) -> str:
    """sha256 of the parts, in hex."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()


def check_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raises NumericError naming what was encoded."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(f"{what}: its {name} hold NaN or infinity; {remedy}.")


class DiskCache:
    """Tensors by key in a folder; without a folder it is always empty."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, key: str) -> Path | None:
        """Where a key's file is."""
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors, or None where there are none, or none that are whole and finite."""
        path = self.path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors = read_tensors(path)
        except FileFormatError:
            return None
        finite = all(bool(torch.isfinite(t).all()) for t in tensors.values())
        return tensors if finite else None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors; they were checked with `check_finite`."""
        path = self.path(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {name: t.contiguous() for name, t in tensors.items()})
