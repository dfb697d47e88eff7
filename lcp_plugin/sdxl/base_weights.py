"""base_weights: LoRA files that belong to the base; never delivered.

W_0' = W_0 + sum_i m_i D_i. On an fp32 base the sum is added to the weights once, in fp32; on a
half-precision or float8 base it runs beside each layer, since small updates would be lost in
rounding (kohya-ss/sd-scripts rounds them in, networks/lora.py merge_to at 48d368fa). A lineage
records files, multipliers and hashes, so that W_0' can be made again (`BaseSource`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcp_plugin.biases import Change
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError, LineageError, Page, explaining
from lcp_plugin.formats.identity import file_model_hash, hash_tensors
from lcp_plugin.formats.lora_file import find_lora, read_lora
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.live_biases import add_biases
from lcp_plugin.sdxl.load import BaseId, identify_base
from lcp_plugin.sdxl.long_prompts import TextRules
from lcp_plugin.sdxl.sites import Site, fuse_for_good


@dataclass(frozen=True)
class BaseSource:
    """What W_0 of a run is made from, so that it can be made again."""

    name: str  # as it is shown
    hash: str = ""  # of all of it; "" is not checked
    origin: str = ""  # folder, file or hub id that is loaded; "" is `name`
    added: tuple[tuple[str, float, str], ...] = ()  # path, multiplier, sshs_model_hash ("" unknown)
    v_prediction: bool = False  # whatever the base's own files say
    zero_terminal_snr: bool | None = None  # None: the base's own schedule
    vae: str | None = None
    texts: TextRules = TextRules()  # how prompts become tokens

    @property
    def model(self) -> str:
        """What is loaded."""
        return self.origin or self.name


def list_base_weights(options: Options) -> list[tuple[Path, float]]:
    """Files and their multipliers; missing multipliers are 1."""
    return pair_multipliers(options.base_weights, options.base_weights_multiplier)


def pair_multipliers(files: Sequence[str], given: Sequence[float]) -> list[tuple[Path, float]]:
    """Files with their multipliers; missing ones are 1."""
    return [(Path(file), given[i] if i < len(given) else 1.0) for i, file in enumerate(files)]


def identify_with(base: BaseId, options: Options) -> BaseId:
    """The base with its base_weights: another name and another hash, so chains cannot mix them."""
    return identify_sum(base, list_base_weights(options))


def identify_sum(base: BaseId, parts: Sequence[tuple[Path, float]]) -> BaseId:
    """The base with (file, multiplier) parts added. Raises FileFormatError for no LoRA file."""
    if not parts:
        return base
    files = [(find_lora(path), weight) for path, weight in parts]
    added = [
        {"path": file.absolute().as_posix(), "weight": weight, "hash": file_model_hash(file)}
        for file, weight in files
    ]
    text = "\n".join([base.hash, *(f"{part['hash']} {part['weight']!r}" for part in added)])
    digest = hash_tensors({"base": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
    named = "".join(f" + {weight:g} x {path.name}" for path, weight in parts)
    return BaseId(base.name + named, digest, base.name, added)


def source_of(facts: Mapping[str, Any]) -> BaseSource:
    """The base that a lineage.json tells of; of runs without a list of parts from their options."""
    base, options = facts["base"], facts.get("options", {})
    files = pair_multipliers(
        options.get("base_weights", ()), options.get("base_weights_multiplier", ())
    )
    added = tuple(
        (str(p["path"]), float(p["weight"]), str(p["hash"])) for p in base.get("added", ())
    )
    origin = base.get("origin") or (options["pretrained_model_name_or_path"] if files else "")
    return BaseSource(
        name=str(base["name"]),
        hash=str(base["hash"]),
        origin=str(origin),
        added=added or tuple((path.as_posix(), weight, "") for path, weight in files),
        v_prediction=bool(options.get("v_parameterization")),
        zero_terminal_snr=options.get("zero_terminal_snr"),
        vae=options.get("vae"),
        texts=TextRules(options.get("max_token_length"), bool(options.get("weighted_captions"))),
    )


@explaining(Page.SCORES, LineageError)
def check_added(source: BaseSource) -> None:
    """Whether base_weights are still there, and still what the run was trained on.

    Raises:
        LineageError: one line, naming the file that is gone or has changed.
    """
    for path, _, digest in source.added:
        if not Path(path).exists():
            raise LineageError(
                f"the base_weights {path} are gone, which '{source.name}' is made of; put the file "
                "back, or name where it is with --base_weights."
            )
        if digest and file_model_hash(find_lora(path)) != digest:
            raise LineageError(
                f"the base_weights {path} have changed since '{source.name}' was made of them "
                f"(wanted tensors {digest[:10]}); put the old file back."
            )


@explaining(Page.SCORES, LineageError)
def check_source(source: BaseSource) -> None:
    """Whether the base and its base_weights are still what they were. Raises LineageError."""
    check_added(source)
    parts = [(Path(path), weight) for path, weight, _ in source.added]
    found = identify_sum(identify_base(source.model), parts).hash
    if source.hash and found != source.hash:
        raise LineageError(
            f"base '{source.model}' has changed: wanted '{source.name}' with {source.hash[:10]}, "
            f"found {found[:10]}; put it back, or name where it is with --base."
        )


def read_base_weights(options: Options) -> Change:
    """sum_i m_i D_i. Raises FileFormatError for a file that cannot be read."""
    return sum_weights(list_base_weights(options))


def sum_weights(parts: Sequence[tuple[Path, float]]) -> Change:
    """sum_i m_i D_i of files and multipliers."""
    total = Change()
    for path, weight in parts:
        total = total + read_lora(path).change.weighted(weight)
    return total


def add_to_base(layers: Mapping[str, nn.Module], change: Change, fuse: bool) -> None:
    """Makes a change part of the layers for good: in their weights, or beside them.

    Raises:
        ConfigError: a module or shape that the base does not have.  LineageError: a bias.
    """
    for name, entry in change.delta.items():
        if name not in layers or entry.shape != layer_shape(layers[name]):
            raise ConfigError(f"base_weights change {name}, which this base does not have so.")
    add_biases(layers, change.biases, "one of base_weights")
    for name, entry in change.delta.items():
        if fuse:
            fuse_for_good(name, layers[name], entry)
        else:
            Site(name, layers[name]).set_branch(entry)
