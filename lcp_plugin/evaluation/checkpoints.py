"""Reads the tensors of a `.pth` checkpoint without unpickling: nothing in the file is executed.

PyTorch's two formats (the zip archive since 1.6, and the older plain stream) both hold a pickle
program that describes dictionaries of tensors, and the tensors' bytes beside it. The program's
opcodes (`pickletools` only lists them) are walked here with a table of the harmless ones: a global
is a name that is never imported, a call of anything but the three ways in which torch writes a
tensor yields an inert `Opaque`. Safetensors files are read by safetensors itself.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcp_plugin.errors import FileFormatError

DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Opaque:
    """Something that is neither a tensor nor a plain value; kept as the name of its class."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A flat run of elements, named by its key in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Placed:
    """A tensor: where in which storage it lies."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """The marker that MARK pushes."""


MARK = _Mark()


class _Walker:
    """Runs the data-building opcodes of one pickle program on a stack of inert values."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The program's value; leaves `stream` behind its STOP."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise self._refuse("the end of the program")

    def _step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(LITERALS[name](argument))
        elif name in PUSHED:
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ACTIONS:
            ACTIONS[name](self)
        else:
            raise self._refuse(f"opcode {name}")

    def _refuse(self, what: str) -> FileFormatError:
        return FileFormatError(
            f"{self.source} is not a checkpoint of tensors ({what}); save it as safetensors."
        )

    def pop_marked(self) -> list[Any]:
        """Everything above the newest mark, which is dropped with it."""
        at = max(i for i, value in enumerate(self.stack) if value is MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def push_tuple(self, size: int) -> None:
        """The top `size` values as a tuple."""
        values = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.stack.append(values)

    def set_items(self, values: list[Any]) -> None:
        """key, value, key, value, ... into the dictionary on the stack (an Opaque ignores them)."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def append_items(self, values: list[Any]) -> None:
        """Values onto the list on the stack (an Opaque ignores them)."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def stack_global(self) -> None:
        """module, name -> an inert name."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Opaque(f"{module}.{name}"))

    def build(self) -> None:
        """An object's state: only an attribute of ordered dictionaries and Opaques; dropped."""
        self.stack.pop()

    def reduce(self) -> None:
        """callable, arguments -> a tensor's place, an empty dictionary, or an Opaque."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_called(function, arguments))

    def persistent(self) -> None:
        """('storage', class, key, device, numel[, view]) -> Storage."""
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            raise self._refuse("a foreign persistent id")
        kind = getattr(reference[1], "name", "").rsplit(".", 1)[-1]
        if kind not in DTYPES or (len(reference) > 5 and reference[5] is not None):
            raise self._refuse(f"storage {kind or reference[1]!r}")
        self.stack.append(Storage(str(reference[2]), DTYPES[kind], int(reference[4])))


def _called(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Opaque) else ""
    if name.startswith("torch._utils._rebuild_tensor") and isinstance(arguments[0], Storage):
        storage, offset, shape, stride = arguments[:4]
        return Placed(storage, int(offset), tuple(shape), tuple(stride))
    if name == "torch._utils._rebuild_parameter":
        return arguments[0]
    if name == "collections.OrderedDict":
        return {}
    return Opaque(name)


LITERALS: Mapping[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_SET": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "MARK": lambda _: MARK,
    "GLOBAL": lambda argument: Opaque(argument.replace(" ", ".")),
}
PUSHED = frozenset(
    {
        "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "STRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
ACTIONS: Mapping[str, Callable[[_Walker], Any]] = {
    "TUPLE": lambda w: w.stack.append(tuple(w.pop_marked())),
    "LIST": lambda w: w.stack.append(w.pop_marked()),
    "TUPLE1": lambda w: w.push_tuple(1),
    "TUPLE2": lambda w: w.push_tuple(2),
    "TUPLE3": lambda w: w.push_tuple(3),
    "SETITEMS": lambda w: w.set_items(w.pop_marked()),
    "SETITEM": lambda w: w.set_items([*reversed((w.stack.pop(), w.stack.pop()))]),
    "APPENDS": lambda w: w.append_items(w.pop_marked()),
    "APPEND": lambda w: w.append_items([w.stack.pop()]),
    "ADDITEMS": lambda w: w.append_items(w.pop_marked()),
    "STACK_GLOBAL": _Walker.stack_global,
    "BUILD": _Walker.build,
    "REDUCE": _Walker.reduce,
    "NEWOBJ": _Walker.reduce,
    "BINPERSID": _Walker.persistent,
    "POP": lambda w: w.stack.pop(),
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors, .pth, .pt or .bin file; nested dictionaries are joined by
    dots (`model_state_dict.module.backbone.conv1.weight`). FileFormatError where it is neither.
    """
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path} is not a readable safetensors file: {error}.") from None
    try:
        program, load = _open_zip(path) if zipfile.is_zipfile(path) else _open_legacy(path)
    except (ValueError, IndexError, KeyError, struct.error, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{path} is damaged or not a PyTorch checkpoint: {error}.") from None
    found: dict[str, Tensor] = {}
    _collect(program, "", load, found)
    return found


def _collect(
    value: Any, prefix: str, load: Callable[[Placed], Tensor], tensors: dict[str, Tensor]
) -> None:
    if isinstance(value, Placed):
        tensors[prefix] = load(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{prefix}.{key}" if prefix else str(key), load, tensors)


def _place(raw: bytes, placed: Placed) -> Tensor:
    """A copy of the storage's elements as the tensor lies in them."""
    flat = torch.frombuffer(bytearray(raw), dtype=placed.storage.dtype)
    return flat.as_strided(placed.shape, placed.stride, placed.offset).clone()


def _open_zip(path: Path) -> tuple[Any, Callable[[Placed], Tensor]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        data = next((n for n in names if n.endswith("/data.pkl")), None)
        if data is None:
            raise ValueError("no data.pkl inside")
        root = data.removesuffix("data.pkl")
        if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
            raise ValueError("big-endian tensors")
        program = _Walker(path).run(io.BytesIO(archive.read(data)))

    def load(placed: Placed) -> Tensor:
        with zipfile.ZipFile(path) as archive:
            return _place(archive.read(f"{root}data/{placed.storage.key}"), placed)

    return program, load


def _open_legacy(path: Path) -> tuple[Any, Callable[[Placed], Tensor]]:
    """magic, protocol, system, value, storage keys; then each storage: int64 numel, elements."""
    stream = io.BytesIO(path.read_bytes())
    if _Walker(path).run(stream) != LEGACY_MAGIC:
        raise ValueError("no checkpoint's magic number")
    _Walker(path).run(stream)
    if not _Walker(path).run(stream).get("little_endian", True):
        raise ValueError("big-endian tensors")
    program = _Walker(path).run(stream)
    keys = [str(key) for key in _Walker(path).run(stream)]
    sizes: dict[str, int] = {}
    _element_sizes(program, sizes)
    raw: dict[str, bytes] = {}
    for key in keys:
        (numel,) = struct.unpack("<q", stream.read(8))
        raw[key] = stream.read(numel * sizes[key])
    return program, lambda placed: _place(raw[placed.storage.key], placed)


def _element_sizes(value: Any, sizes: dict[str, int]) -> None:
    if isinstance(value, Placed):
        sizes[value.storage.key] = value.storage.dtype.itemsize
    elif isinstance(value, dict):
        for inner in value.values():
            _element_sizes(inner, sizes)
