"""Reads the tensors of a checkpoint, published encoders' own files among them.

Safetensors files are read as everywhere. A `.pth` file holds a pickle program, which could run
anything: PyTorch reads it with `weights_only`, whose unpickler builds tensors and plain containers
and refuses every other name but `argparse.Namespace`, which trainers store beside the weights. What
is neither, by its first bytes, is told in our words: PyTorch would advise to let it run code.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.errors import EncoderError
from lcp_plugin.formats.tensors import read_tensors

_PICKLES = (b"PK\x03\x04", b"\x80")  # PyTorch's archive, and its form before 1.6
_SHOWN = 24  # bytes of a file that is something else


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file or of PyTorch's own; nested dictionaries are joined by
    dots (`model_state_dict.module.backbone.conv1.weight`).

    Raises:
        FileFormatError: neither, truncated, or without a tensor.
    """
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return read_tensors(path)
    if not start.startswith(_PICKLES):
        shown = start[:_SHOWN].decode("utf-8", "replace").strip("\0 \n")
        begins = f"it begins with {shown!r}" if start else "it is empty"
        raise EncoderError(
            f"{path} is neither a safetensors file nor a PyTorch checkpoint: {begins}. Give the "
            "file of weights as it was published."
        )
    found: dict[str, Tensor] = {}
    _collect(_load_weights(path), "", found)
    if not found:
        raise EncoderError(
            f"{path} is a PyTorch file without a tensor in it; give the encoder's weights."
        )
    return found


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise EncoderError(f"{path} cannot be read ({error.strerror}).") from error


def _load_weights(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged program fails in whatever it meets first
        raise EncoderError(_refuse(path, str(error))) from None


def _refuse(path: Path, message: str) -> str:
    foreign = re.search(r"GLOBAL (\S+)", message)
    if foreign or "TorchScript" in message:
        what = f"{foreign[1]} in it" if foreign else "a TorchScript program"
        return (
            f"{path} is not a checkpoint of tensors alone ({what}); "
            "save its tensors as safetensors."
        )
    return f"{path} is a truncated or damaged PyTorch checkpoint; download or copy it again."


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{prefix}.{key}" if prefix else str(key), tensors)
