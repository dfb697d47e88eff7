"""base_weights: LoRA files that belong to the base; never delivered.

W_0' = W_0 + sum_i m_i D_i. On an fp32 base the sum is added to the weights once, in fp32; on a
half-precision or float8 base it runs beside each layer, since small updates would be lost in
rounding (kohya-ss/sd-scripts rounds them in, networks/lora.py merge_to at 48d368fa).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.config.options import Options
from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError
from lcp_plugin.files import file_model_hash, hash_tensors
from lcp_plugin.formats import find_lora, read_lora
from lcp_plugin.sdxl.layers import Site, add_delta, layer_shape
from lcp_plugin.sdxl.load import BaseId


def list_base_weights(options: Options) -> list[tuple[Path, float]]:
    """Files and their multipliers; missing multipliers are 1."""
    given: Sequence[float] = options.base_weights_multiplier
    return [
        (Path(name), given[i] if i < len(given) else 1.0)
        for i, name in enumerate(options.base_weights)
    ]


def identify_with(base: BaseId, options: Options) -> BaseId:
    """The base with its base_weights: another name and another hash, so chains cannot mix them."""
    parts = list_base_weights(options)
    if not parts:
        return base
    hashes = [(file_model_hash(find_lora(path)), weight) for path, weight in parts]
    text = "\n".join([base.hash, *(f"{digest} {weight!r}" for digest, weight in hashes)])
    digest = hash_tensors({"base": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
    named = "".join(f" + {weight:g} x {path.name}" for path, weight in parts)
    return BaseId(base.name + named, digest)


def read_base_weights(options: Options) -> Delta:
    """sum_i m_i D_i. Raises FileFormatError for a file that cannot be read."""
    total = Delta()
    for path, weight in list_base_weights(options):
        total = total + read_lora(path).total.weighted(weight)
    return total


def add_to_base(layers: Mapping[str, nn.Module], delta: Delta, fuse: bool) -> None:
    """Makes a delta part of the layers for good: in their weights, or beside them.

    Raises:
        ConfigError: a module or shape that the base does not have.
    """
    for name, entry in delta.items():
        if name not in layers or entry.shape != layer_shape(layers[name]):
            raise ConfigError(f"base_weights change {name}, which this base does not have so.")
    for name, entry in delta.items():
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if fuse:
            flat = weight.data.float().reshape(entry.shape)
            weight.data = add_delta(flat, entry).to(weight.dtype).view(weight.shape)
        else:
            site = Site(name, layer)
            site.set_branch(entry)
            layer.register_forward_pre_hook(_follow(site))


def _follow(site: Site) -> Any:
    """A hook that keeps a branch on the device of its layer's input (text encoders move)."""

    def move(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        branch = site.branch
        if branch is not None and branch.down.device != args[0].device:
            branch.down = branch.down.to(args[0].device)
            branch.up = None if branch.up is None else branch.up.to(args[0].device)

    return move
