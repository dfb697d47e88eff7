"""MagMax from file to file in bounded memory (arXiv 2407.06322, eq. 3).

Entry by entry the larger of two updates, as `Delta.select_by_magnitude`, to the bit; but one module
is in memory at a time, in buffers that are used again. A matrix is formed whole (a product of some
of its rows may round otherwise) and selected in blocks of rows that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, Kernel
from lcp_plugin.delta import (
    Delta,
    Entry,
    Stacked,
    adapter_from_tensors,
    delta_from_tensors,
    delta_to_tensors,
)
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.formats.disk import replacing, require_free_space, writing
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.tensors import TensorInfo, build_header, read_header

BLOCK = 128 * 1280  # entries selected at once: 0.7 MB, which a core's own cache holds
PREFIXES = ("delta/", "adapter/")
Layout = dict[str, tuple[str, tuple[int, ...]]]  # key -> (type, shape)


@dataclass(frozen=True)
class Selection:
    """What `select_files` wrote."""

    modules: int
    selected: int  # modules that both files change
    bytes: int


@dataclass(frozen=True)
class Size:
    """Of one module's matrix."""

    shape: tuple[int, int]  # (out, in)
    kernel: Kernel | None


class UpdateFile:
    """The total update that a file holds, read module by module.

    A carry (`delta/...` and `adapter/...`, see `store.carry_to_tensors`) stays on disk; the factors
    of a LoRA file of any other kind are kept.

    Raises:
        FileFormatError: as `read_lora` and `read_header`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self._start = header.size
        self._parts: dict[str, dict[str, TensorInfo]] = {}  # module -> key -> place
        self._delta, self._adapter = Delta(), Adapter()
        if header.tensors and not any(key.startswith(PREFIXES) for key in header.tensors):
            lora = read_lora(self.path)
            self._delta, self._adapter = lora.delta, lora.adapter
            return
        for key, info in header.tensors.items():
            module = key.partition("/")[2].rpartition(".")[0]
            self._parts.setdefault(module, {})[key] = info

    @property
    def names(self) -> set[str]:
        """The modules that it changes."""
        return {*self._parts, *self._delta, *self._adapter}

    def entry(self, name: str) -> Entry:
        """One module's total update, read now. Raises FileFormatError."""
        delta, adapter = self._delta.restrict([name]), self._adapter.restrict([name])
        if name in self._parts:
            tensors = {key: self._read(info) for key, info in self._parts[name].items()}
            delta = delta_from_tensors(tensors, "delta/")
            adapter = adapter_from_tensors(tensors, "adapter/")
        return (delta + Delta.of(adapter))[name]

    def size(self, name: str) -> Size:
        """Shape and kernel of a module, without reading its matrix."""
        if self._is_plain(name):
            info = self._parts[name][f"delta/{name}.dense"]
            return Size((info.shape[0], info.shape[1]), None)
        known = self._delta.get(name) or self._adapter.get(name) or self.entry(name)
        return Size(known.shape, known.kernel)

    def form(self, name: str, buffer: Tensor) -> Tensor:
        """One module's total update as a flat matrix in `buffer`, fp32   # (out * in,)."""
        if self._is_plain(name):
            return self._read(self._parts[name][f"delta/{name}.dense"], buffer).reshape(-1)
        entry = self.entry(name)
        matrix = buffer[: math.prod(entry.shape)]
        if isinstance(entry, Stacked):
            torch.mm(entry.up, entry.down, out=matrix.view(entry.shape))
        else:
            matrix.copy_(entry.weight.reshape(-1))
        return matrix

    def _is_plain(self, name: str) -> bool:
        """Whether the file holds this module as one fp32 matrix and nothing else."""
        parts = self._parts.get(name, {})
        info = parts.get(f"delta/{name}.dense")
        return len(parts) == 1 and info is not None and (info.dtype, len(info.shape)) == ("F32", 2)

    def _read(self, info: TensorInfo, buffer: Tensor | None = None) -> Tensor:
        """A tensor, into `buffer` if there is one."""
        count = math.prod(info.shape)
        flat = torch.empty(count, dtype=info.torch_dtype) if buffer is None else buffer[:count]
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + info.start)
                read = file.readinto(_bytes_of(flat)) if count else 0
        except OSError as error:
            raise FileFormatError(f"{self.path} cannot be read ({error.strerror}).") from error
        if read != info.end - info.start:
            raise FileFormatError(f"{self.path} became shorter while it was read; copy it again.")
        return flat.view(info.shape)


def select_files(
    newest: str | Path,
    older: str | Path,
    target: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> Selection:
    """Writes the carry whose delta is, entry by entry, the larger of two updates; ties to `newest`.

    What is written is what `files.write_tensors` makes of the selected delta, byte for byte.

    Args:
        newest, older: carries, or LoRA files of any kind (a task's adapter).
    Raises:
        FileFormatError: damaged, or shapes that differ.  NumericError: NaN or infinity.
        DiskError: no space; what was there before is whole.
    """
    first, second = UpdateFile(newest), UpdateFile(older)
    sizes = {name: _common_size(name, first, second) for name in first.names & second.names}
    alone = {name: first if name in first.names else second for name in first.names ^ second.names}
    layout = _plan_layout(sizes, alone)
    head = build_header(layout, metadata)
    largest = max((math.prod(size.shape) for size in sizes.values()), default=0)
    buffers = torch.empty(largest), torch.empty(largest)
    total = len(head) + sum(math.prod(s) * (8 if t == "I64" else 4) for t, s in layout.values())
    require_free_space(Path(target).parent, total, str(target))
    with replacing(target) as temporary, writing(temporary) as write:
        write(head)
        for key in layout:
            name, _, part = key.removeprefix("delta/").rpartition(".")
            if name in alone:
                tensor = _tensors_of(name, alone[name])[key]
            elif part == "kernel":
                tensor = torch.tensor(sizes[name].kernel, dtype=torch.int64)
            else:
                tensor = first.form(name, buffers[0])
                _keep_larger(name, tensor, second.form(name, buffers[1]))
            write(_bytes_of(tensor.reshape(-1)))
    return Selection(len(alone) + len(sizes), len(sizes), total)


def _common_size(name: str, first: UpdateFile, second: UpdateFile) -> Size:
    a, b = first.size(name), second.size(name)
    if a.shape != b.shape:
        raise FileFormatError(
            f"{name} is {a.shape} in {first.path} and {b.shape} in {second.path}; they belong to "
            "different bases."
        )
    return Size(a.shape, a.kernel or b.kernel)


def _plan_layout(sizes: Mapping[str, Size], alone: Mapping[str, UpdateFile]) -> Layout:
    """Every tensor of the target, in safetensors' order: larger types first, then by name."""
    layout: Layout = {}
    for name, file in alone.items():
        for key, tensor in _tensors_of(name, file).items():
            kind = "I64" if tensor.dtype is torch.int64 else "F32"
            layout[key] = (kind, tuple(tensor.shape))
    for name, size in sizes.items():
        layout[f"delta/{name}.dense"] = ("F32", size.shape)
        if size.kernel is not None:
            layout[f"delta/{name}.kernel"] = ("I64", (2,))
    return dict(sorted(layout.items(), key=lambda item: (item[1][0] != "I64", item[0].encode())))


def _tensors_of(name: str, file: UpdateFile) -> dict[str, Tensor]:
    return delta_to_tensors(Delta({name: file.entry(name)}), "delta/")


def _keep_larger(name: str, newest: Tensor, older: Tensor) -> None:
    """newest <- entry by entry the larger one, in place; both flat, fp32."""
    one, two = torch.empty(min(BLOCK, newest.numel())), torch.empty(min(BLOCK, newest.numel()))
    for start in range(0, newest.numel(), BLOCK):
        a, b = newest[start : start + BLOCK], older[start : start + BLOCK]
        size, other = one[: len(a)], two[: len(a)]
        torch.abs(a, out=size)
        torch.abs(b, out=other)
        torch.maximum(size, other, out=size)
        if not math.isfinite(float(size.amax())):  # amax hands NaN on
            raise NumericError(f"the update of {name} holds NaN or infinity; nothing is written.")
        total = torch.add(a, b, out=other)  # has the sign of the larger one, unless it is 0
        if float(total.abs().amin()) > 0:
            torch.copysign(size, total, out=a)
        else:  # of equal size and opposite signs, or both 0
            torch.where(a.abs() >= b.abs(), a, b, out=a)


def _bytes_of(flat: Tensor) -> Any:
    return flat.contiguous().view(torch.uint8).numpy()
