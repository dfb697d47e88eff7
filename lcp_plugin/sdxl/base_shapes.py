"""The shapes of a base's layers, from the headers of its weights: no weight is read.

diffusers folder    `X.weight` of unet, text_encoder and text_encoder_2 is module X's
single file         `checkpoint_slot` says where a module lies; q, k and v may share a tensor

A LoRA of other widths is so refused before a model is loaded. What a header does not tell (a
quantised weight, a module without a matrix of its own) is left to the loaded model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lcp_plugin.biases import Biases
from lcp_plugin.errors import FileFormatError, LineageError
from lcp_plugin.formats.keys import canonical, checkpoint_slot
from lcp_plugin.formats.lora_file import LoraFile
from lcp_plugin.formats.tensors import TensorInfo, read_header
from lcp_plugin.sdxl.load import WEIGHT_FOLDERS, find_base


class Shaped(Protocol):
    """The change of one module: factors, or an entry of a delta."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""


@dataclass(frozen=True)
class BaseShapes:
    """What the headers of a base say of its layers."""

    name: str
    tensors: Mapping[str, TensorInfo]  # by our names, or by a checkpoint's own
    is_checkpoint: bool = False

    def find(self, module: str, part: str = "weight") -> tuple[int, ...] | None:
        """(out, in) of a weight, (out,) of a bias; () where headers do not tell, None for none."""
        thirds, key = 1, f"{module}.{part}"
        if self.is_checkpoint:
            try:
                slot, third = checkpoint_slot(module)
            except FileFormatError:
                return ()
            thirds, key = (1 if third is None else 3), slot.removesuffix("weight") + part
        if (info := self.tensors.get(key)) is None:
            return None
        if not info.torch_dtype.is_floating_point or not info.shape:
            return ()
        out = info.shape[0] // thirds
        return (out,) if part == "bias" else (out, math.prod(info.shape[1:]))

    def check(self, what: str, changes: Mapping[str, Shaped], biases: Biases | None = None) -> None:
        """Raises LineageError where `what`, as messages name it, was made for another base."""
        wanted: dict[tuple[str, str], tuple[int, ...]]
        wanted = {(name, "weight"): change.shape for name, change in changes.items()}
        wanted |= {(name, "bias"): tuple(d.shape) for name, d in (biases or {}).items()}
        found = {(name, part): self.find(name, part) for name, part in wanted}
        unfit = [key for key in wanted if found[key] != () and found[key] != wanted[key]]
        if not unfit:
            return
        (module, part), got = unfit[0], wanted[unfit[0]]
        theirs, more = found[unfit[0]], len(unfit) - 1
        size = f", {_show(got)}" if part == "weight" else f" in {_show(got)} places"
        has = "none there" if theirs is None else _show(theirs)
        raise LineageError(
            f"{what} changes the {part} of {module}{size}; base '{self.name}' has {has}"
            f"{f' ({more} more do not fit either)' if more else ''}: it was made for another base. "
            "Choose the base that it was trained on, or another LoRA."
        )


def read_shapes(name: str | None) -> BaseShapes:
    """The shapes of a base. Raises BaseModelError, FileFormatError as `find_base` does."""
    path = find_base(name)
    if path.is_file():
        return BaseShapes(str(name), read_header(path).tensors, is_checkpoint=True)
    return BaseShapes(str(name), dict(_tensors_of_folder(path)))


def check_loras(base: str | None, files: Mapping[str, LoraFile | None]) -> None:
    """Raises LineageError for a LoRA of another base; each is under the name that messages use."""
    given = {what: file for what, file in files.items() if file is not None}
    shapes = read_shapes(base) if given else None
    for what, file in given.items():
        if shapes is not None:
            shapes.check(what, {**file.delta, **file.adapter}, file.biases)


def _tensors_of_folder(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    for folder in WEIGHT_FOLDERS:
        for file in sorted((path / folder).glob("*.safetensors")):
            for key, info in read_header(file).tensors.items():
                yield canonical(f"{folder}.{key}"), info


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
