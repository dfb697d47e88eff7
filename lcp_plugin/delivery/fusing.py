"""Fuse a change into model files, streamed: W' = round(W + D), one tensor in memory at a time.

Works on safetensors files of any layout, given which tensor holds which module. Every other tensor
is copied byte for byte; names, order, types and metadata stay. D is added in fp32 and rounded once
to the file's own type; the share lost, ||W' - W - D|| / ||D||, is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.adapter import is_finite
from lcp_plugin.biases import Change
from lcp_plugin.delta import Dense, Entry
from lcp_plugin.errors import BaseModelError, FileFormatError
from lcp_plugin.formats.disk import writing
from lcp_plugin.formats.keys import canonical, checkpoint_slot
from lcp_plugin.formats.tensors import Header, TensorInfo, TensorReader, build_header, raw_bytes
from lcp_plugin.sdxl.rounding import add_delta, rounding_loss

ROWS = 128  # looked at at once


@dataclass(frozen=True)
class Place:
    """A module's place in a tensor: all of it, or one third of its rows (q, k or v)."""

    module: str
    third: int | None = None
    of_bias: bool = False

    def entry(self, change: Change) -> Entry:
        """What is added there; to a bias a column (out, 1)."""
        if self.of_bias:
            return Dense(change.biases[self.module][:, None])
        return change.delta[self.module]


Slots = Mapping[str, Sequence[Place]]  # tensor name -> the modules in it


@dataclass(frozen=True)
class Fused:
    """What fusing did; two of them add up."""

    modules: int = 0
    lost: float = 0.0  # ||W' - W - D||^2
    size: float = 0.0  # ||D||^2

    def __add__(self, other: Fused) -> Fused:
        """Both together."""
        return Fused(self.modules + other.modules, self.lost + other.lost, self.size + other.size)

    @property
    def rounding_share(self) -> float:
        """||W' - W - D|| / ||D||."""
        return math.sqrt(self.lost / self.size) if self.size else 0.0


def checkpoint_slots(header: Header, change: Change) -> dict[str, list[Place]]:
    """Where the modules that change lie in a single-file SDXL checkpoint.

    Raises:
        BaseModelError: a weight or bias that the checkpoint does not hold.
    """
    slots: dict[str, list[Place]] = {}
    missing = []
    for modules, of_bias in ((change.delta, False), (change.biases, True)):
        for module in modules:
            name, third = checkpoint_slot(module)
            if of_bias:  # ...weight, and OpenCLIP's in_proj_weight
                name = name.removesuffix("weight") + "bias"
            if name not in header.tensors:
                missing.append(name)
            slots.setdefault(name, []).append(Place(module, third, of_bias))
    if missing:
        raise BaseModelError(
            f"the checkpoint lacks {few(missing)}, which the adapter changes; "
            "is it an SDXL checkpoint?"
        )
    return slots


def few(names: Sequence[str]) -> str:
    """The first name, and how many more."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def component_slots(header: Header, component: str, change: Change) -> dict[str, list[Place]]:
    """Where the modules that change lie in a weights file of one diffusers component."""
    slots = {}
    for name in header.tensors:
        rest, _, part = name.rpartition(".")
        module = canonical(f"{component}.{rest}")
        if part == "weight" and module in change.delta:
            slots[name] = [Place(module)]
        elif part == "bias" and module in change.biases:
            slots[name] = [Place(module, of_bias=True)]
    return slots


def fuse_file(source: Path, target: Path, slots: Slots, change: Change) -> Fused:
    """Write `source` with `change` fused to `target`, not synced (wrap in `replacing`).

    Raises:
        BaseModelError: a shape that does not fit, or a tensor that is no float.
        OSError: the write failed.
    """
    reader = TensorReader(source)
    tensors = reader.header.tensors
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, places in slots.items():
        _check_fits(source, name, ordered[name], places, change)
    fused = Fused()
    layout = {name: (info.dtype, info.shape) for name, info in ordered.items()}
    with writing(target) as write:
        write(build_header(layout, reader.header.metadata))
        for name in ordered:
            if name in slots:
                changed, found = _fuse_tensor(reader, name, slots[name], change)
                fused = fused + found
                write(raw_bytes(changed.contiguous()))
            else:
                for chunk in reader.chunks(name):
                    write(chunk)
    return fused


def _check_fits(
    source: Path, name: str, info: TensorInfo, places: Sequence[Place], change: Change
) -> None:
    for place in places:
        rows, columns = place.entry(change).shape
        wanted = (rows if place.third is None else 3 * rows, columns)
        flat = len(info.shape) < (1 if place.of_bias else 2)
        if flat or (info.shape[0], math.prod(info.shape[1:])) != wanted:
            raise BaseModelError(
                f"{source.name}: {name} is {info.shape}, the adapter wants {wanted}; it was made "
                "for another base."
            )
    if not info.torch_dtype.is_floating_point:
        raise BaseModelError(
            f"{source.name}: {name} is of type {info.dtype}, nothing to add to; use an "
            "unquantised checkpoint."
        )


def _fuse_tensor(
    reader: TensorReader, name: str, places: Sequence[Place], change: Change, measure: bool = True
) -> tuple[Tensor, Fused]:
    changed = reader.read(name)
    fused = Fused()
    for place in places:
        entry = place.entry(change)
        rows = slice(None)
        if place.third is not None:
            rows = slice(place.third * entry.shape[0], (place.third + 1) * entry.shape[0])
        before = changed[rows].float().reshape(entry.shape)
        rounded = add_delta(before, entry).to(changed.dtype)
        if not all(is_finite(block.float()) for block in torch.split(rounded, ROWS)):
            raise BaseModelError(
                f"{name} overflows {changed.dtype} with the adapter added; use a bf16 or fp32 base."
            )
        if measure:
            fused = fused + Fused(1, *rounding_loss(before, entry, rounded))
        changed[rows] = rounded.reshape(changed[rows].shape)
    return changed, fused


def check_fused(source: Path, target: Path, slots: Slots, change: Change) -> None:
    """Read a fused file back: everything else is the base's, the changed tensors are W + D.

    Raises:
        FileFormatError: the file on disk is not what was meant.
    """
    before, after = TensorReader(source), TensorReader(target)
    if before.header != after.header:
        raise FileFormatError(f"{target.name} does not read back as it was written.")
    for name in before.header.tensors:
        if name in slots:
            wanted, _ = _fuse_tensor(before, name, slots[name], change, measure=False)
            same = torch.equal(after.read(name), wanted)
        else:
            pairs = zip(before.chunks(name), after.chunks(name), strict=True)
            same = all(one == other for one, other in pairs)
        if not same:
            raise FileFormatError(f"{target.name}: {name} does not read back as it was written.")
