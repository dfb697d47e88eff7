"""Reads the tensors of a checkpoint, published encoders' own files among them.

Safetensors files are read by safetensors. A `.pth` file holds a pickle program, which could run
anything: PyTorch reads it with `weights_only`, whose unpickler builds tensors and plain containers
and refuses every other name but `argparse.Namespace`, which trainers store beside the weights.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcp_plugin.errors import EncoderError

LONGEST_REASON = 200  # characters of PyTorch's message


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors, .pth, .pt or .bin file; nested dictionaries are joined by
    dots (`model_state_dict.module.backbone.conv1.weight`). FileFormatError where it is neither.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        except (SafetensorError, OSError) as error:
            raise EncoderError(f"{path} is not a readable safetensors file: {error}.") from None
    found: dict[str, Tensor] = {}
    _collect(_load_weights(path), "", found)
    return found


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
    if foreign:
        return (
            f"{path} is not a checkpoint of tensors alone ({foreign[1]} in it); "
            "save its tensors as safetensors."
        )
    reason = " ".join(message.split())[:LONGEST_REASON]
    return f"{path} is damaged or not a PyTorch checkpoint: {reason}"


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{prefix}.{key}" if prefix else str(key), tensors)
