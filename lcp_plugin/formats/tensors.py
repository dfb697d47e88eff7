"""Tensors on disk: safetensors files, whose headers are checked before anything is allocated.

A safetensors file is 8 bytes (length of the header, little-endian), the header (JSON), the data.
The header is read and checked by ourselves: length, JSON, types, and that the offsets follow from
shapes and types and tile the data exactly, without overlap or hole, up to the last byte of the
file. Pickles (.pt, .ckpt, .bin) are refused: unpickling runs code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.disk import first_line, write_chunks

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
# dtype -> (bytes, torch type), in the order in which safetensors sorts (largest first in the file)
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "BOOL": (1, torch.bool),
    "U8": (1, torch.uint8),
    "I8": (1, torch.int8),
    "F8_E5M2": (1, torch.float8_e5m2),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "I16": (2, torch.int16),
    "U16": (2, torch.uint16),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I32": (4, torch.int32),
    "U32": (4, torch.uint32),
    "F32": (4, torch.float32),
    "C64": (8, torch.complex64),
    "F64": (8, torch.float64),
    "I64": (8, torch.int64),
    "U64": (8, torch.uint64),
}
NAME_OF = {dtype: name for name, (_, dtype) in DTYPES.items()}
_ORDER = {name: position for position, name in enumerate(DTYPES)}
FileLayout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (type's name, shape)
_CHUNK = 1 << 22
_CONVERT = (
    "convert it with safetensors.torch.save_file(torch.load(file, weights_only=True), "
    "'new.safetensors') on a machine where you trust its source, and give the new file"
)
_FACTS = {"dtype", "shape", "data_offsets"}  # what the header tells of a tensor
_FOREIGN = (  # first bytes -> what the file is and what to do
    (
        b"PK\x03\x04",
        f"is a PyTorch pickle archive, which can run code and is never opened; {_CONVERT}",
    ),
    (b"\x80", f"is a pickle, which can run code and is never opened; {_CONVERT}"),
    (b"GGUF", "is a GGUF file; give the .safetensors it was made from"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself; run git lfs pull"),
    (b"<", "is a web page, not a model; the download failed (a login may be needed)"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header declares it, checked."""

    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # offsets into the data part
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type in torch's words."""
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Header:
    """A checked header."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    size: int  # bytes before the data: 8 + length of the JSON

    @property
    def data_size(self) -> int:
        """Bytes of the data part."""
        return max((info.end for info in self.tensors.values()), default=0)


# ------------------------------------------------------------------------------------- reading


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, checked in full; no tensor is touched.

    Raises:
        FileFormatError: missing, foreign (pickle, web page, ...), truncated or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            text = _read_header_bytes(path, file, total)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}).") from error
    data = _parse_header(path, text)
    metadata = _check_metadata(path, data.pop("__metadata__", None))
    tensors = {name: _check_tensor(path, name, entry) for name, entry in data.items()}
    _check_tiling(path, tensors, total - 8 - len(text))
    return Header(metadata, tensors, 8 + len(text))


def _read_header_bytes(path: Path, file: Any, total: int) -> bytes:
    first = file.read(64)
    for magic, words in _FOREIGN:  # a header of 0x80.. or '<'.. bytes may start like one of these
        if first.startswith(magic) and first[8:9] != b"{":
            raise FileFormatError(f"{path} {words}.")
    if total < 10 or first[8:9] != b"{":
        raise FileFormatError(
            f"{path} is not a safetensors file ({total} bytes, no header); is it complete?"
        )
    length = int.from_bytes(first[:8], "little")
    if length > min(MAX_HEADER_BYTES, total - 8):
        raise FileFormatError(
            f"{path} declares a header of {length} bytes but has {total - 8} after the length; "
            "it is truncated or damaged; download or copy it again."
        )
    file.seek(8)
    text: bytes = file.read(length)
    if len(text) != length:
        raise FileFormatError(f"{path} became shorter while it was read; copy it again.")
    return text


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if isinstance(data, dict):
            "".join(data).encode("utf-8")  # lone surrogates decode but are no text
    except (ValueError, RecursionError) as error:
        words = first_line(error, 80)
        raise FileFormatError(f"{path} has a damaged header ({words}); copy it again.") from error
    if not isinstance(data, dict):
        raise FileFormatError(f"{path} has a header that is no table of tensors; copy it again.")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _check_metadata(path: Path, data: Any) -> dict[str, str]:
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise FileFormatError(f"{path} has metadata that is not text; the file is damaged.")
    try:
        "".join(chain.from_iterable(data.items())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileFormatError(f"{path} has metadata that is not text (UTF-8).") from error
    return data


def _check_tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FACTS:
        raise FileFormatError(f"{path}: the header entry of {_show(name)} is damaged.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(
            f"{path}: {_show(name)} has the type {str(dtype)[:20]!r}; "
            f"known are {', '.join(DTYPES)}."
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FileFormatError(
            f"{path}: shape or offsets of {_show(name)} are not sizes; it is damaged."
        )
    start, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype][0]
    if end - start != wanted:
        raise FileFormatError(
            f"{path}: {_show(name)} of shape {str(shape)[:60]} and type {dtype} does not fit its "
            f"offsets {str(offsets)[:60]}; the file is damaged."
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _show(name: str) -> str:
    """A tensor's name for a message: not too long, and without what a terminal would obey."""
    shown = name if len(name) <= 80 else name[:77] + "..."
    return shown if shown.isprintable() else repr(shown)


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > 32:
        return False
    if not values:  # a scalar's shape
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 62


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], data_size: int) -> None:
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise FileFormatError(f"{path}: tensors overlap or leave holes; the file is damaged.")
        position = info.end
    if position != data_size:
        raise FileFormatError(
            f"{path} holds {data_size} bytes of data, its header wants {position}; it is "
            "truncated or damaged; download or copy it again."
        )


def read_tensors(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name (all of them for None), after `read_header`.

    They are mapped from the file, privately: pages are read when they are used.

    Raises:
        FileFormatError: as `read_header`, or a name that the file does not hold.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    missing = [name for name in wanted if name not in header.tensors]
    if missing:
        raise FileFormatError(
            f"{path} does not hold {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; it is not the file "
            "that was expected."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} cannot be read ({first_line(error)}).") from error


class TensorReader:
    """Reads single tensors of one file, its header read once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(path)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor in memory.

        Raises:
            FileFormatError: the file has changed since its header was read.
        """
        info = self.header.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.torch_dtype)
        if not tensor.numel():
            return tensor
        place = raw_bytes(tensor)
        try:
            with self.path.open("rb") as file:
                file.seek(self.header.size + info.start)
                if file.readinto(place) != info.end - info.start:
                    raise FileFormatError(f"{self.path} became shorter while it was read.")
        except OSError as error:
            raise FileFormatError(f"{self.path} cannot be read ({error.strerror}).") from error
        return tensor

    def chunks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, a few MB at a time. Raises FileFormatError as `read`."""
        info = self.header.tensors[name]
        left = info.end - info.start
        try:
            with self.path.open("rb") as file:
                file.seek(self.header.size + info.start)
                while left:
                    chunk = file.read(min(left, _CHUNK))
                    if not chunk:
                        raise FileFormatError(f"{self.path} became shorter while it was read.")
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise FileFormatError(f"{self.path} cannot be read ({error.strerror}).") from error


# ------------------------------------------------------------------------------------- writing


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; byte for byte what safetensors would write.

    Raises:
        DiskError: as `replacing`.
        FileFormatError: a tensor type that the format does not have, metadata that is not text.
    """
    ordered = order_tensors(tensors)
    header = build_header(layout_of(ordered), metadata)
    write_chunks(path, chain([header], data_chunks(ordered)))


def in_file_order(layout: FileLayout) -> FileLayout:
    """The order in which safetensors writes: larger types first, then by name."""
    return dict(sorted(layout.items(), key=lambda item: (-_ORDER[item[1][0]], item[0].encode())))


def order_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of the file that holds them. Raises FileFormatError."""
    return {name: tensors[name] for name in in_file_order(layout_of(tensors))}


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape. Raises FileFormatError for a type that no file can hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NAME_OF:
            raise FileFormatError(f"{name} has the type {tensor.dtype}, which no file can hold.")
    return {name: (NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def build_header(layout: FileLayout, metadata: Mapping[str, str] | None) -> bytes:
    """The first bytes of a safetensors file whose data follows in the order of `layout`.

    Args:
        layout: tensor name -> (type in safetensors' words, shape).
    Raises:
        FileFormatError: metadata that is not text.
    """
    table: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(v, str) for v in chain.from_iterable(metadata.items())):
            raise FileFormatError("metadata of a safetensors file must be text to text.")
        table["__metadata__"] = dict(metadata)
    position = 0
    for name, (dtype, shape) in layout.items():
        end = position + math.prod(shape) * DTYPES[dtype][0]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_chunks(ordered: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The data part of a file whose tensors are `ordered`, tensor by tensor."""
    for tensor in ordered.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield raw_bytes(flat)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that has elements, as bytes: not a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
