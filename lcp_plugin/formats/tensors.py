"""Tensors and facts on disk: headers checked before anything is allocated, writes all or nothing.

A safetensors file is 8 bytes (length of the header, little-endian), the header (JSON), the data.
The header is read and checked by ourselves: length, JSON, types, and that the offsets follow from
shapes and types and tile the data exactly, without overlap or hole, up to the last byte of the
file. Pickles (.pt, .ckpt, .bin) are refused: unpickling runs code.

A write goes to a temporary file in the same folder, is flushed and synced, renamed into place, and
the folder is synced. Until the rename the old file is whole; after it the new one is.

Hashes are kohya's (sd-scripts, library/train_util.py): `sshs_model_hash` is the sha256 of the data
part of the safetensors serialisation, so it depends on the tensors only, not on the metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.errors import DiskError, FileFormatError, NumericError

OWN_HASH = "ss_lcp_model_hash"  # sshs_model_hash as we wrote it: other tools renew theirs only
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_JSON_BYTES = 256_000_000
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
_NAME_OF = {dtype: name for name, (_, dtype) in DTYPES.items()}
_ORDER = {name: position for position, name in enumerate(DTYPES)}
FileLayout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (type's name, shape)
_CHUNK = 1 << 22
_PIECE = 1 << 20  # bytes of one write: Linux takes several times longer for much larger ones
_BEHIND = 1 << 24  # bytes after which the disk is told to begin
_CONVERT = (
    "convert it with safetensors.torch.save_file(torch.load(file, weights_only=True), "
    "'new.safetensors') on a machine where you trust its source, and give the new file"
)
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
        words = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
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
    shown = name if len(name) <= 80 else name[:77] + "..."
    shown = repr(shown) if not shown.isprintable() else shown
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{path}: the header entry of {shown} is damaged.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(
            f"{path}: {shown} has the type {str(dtype)[:20]!r}; known are {', '.join(DTYPES)}."
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FileFormatError(f"{path}: shape or offsets of {shown} are not sizes; it is damaged.")
    start, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype][0]
    if end - start != wanted:
        raise FileFormatError(
            f"{path}: {shown} of shape {str(shape)[:60]} and type {dtype} does not fit its "
            f"offsets {str(offsets)[:60]}; the file is damaged."
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )


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
        raise FileFormatError(f"{path} cannot be read ({_first_line(error)}).") from error


class TensorReader:
    """Reads single tensors of one file, its header read once: for streaming over many."""

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


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        FileFormatError: missing, unreadable or damaged.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path} is too large for a JSON file of ours.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON ({_first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# ------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the body writes there is synced and renamed to `path`.

    If the body or the disk fails, the temporary file is removed and `path` is as it was. The body
    may read its file back and raise.

    Raises:
        DiskError: any failure of the file system (no space, quota, permission, ...).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:120]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise DiskError(
            f"{path} could not be written ({error.strerror or error}); what was there before is "
            "untouched. Free some space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync of a file or folder. Raises OSError."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its renames are journalled
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise  # some network file systems cannot sync folders
    finally:
        os.close(handle)


def remove_temporary_files(folder: str | Path) -> None:
    """Remove what a killed process left of `replacing` in `folder` (not in its subfolders)."""
    for file in Path(folder).glob(".*-????????.tmp"):
        with suppress(OSError):
            file.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises DiskError."""
    _write_chunks(path, [data])


def write_json(path: str | Path, data: Any) -> None:
    """Write a value as JSON, whole or not at all.

    Raises:
        DiskError: as `replacing`.
        NumericError: the value holds NaN or infinity, which JSON has no words for.
    """
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericError(f"{path} would hold NaN or infinity; it is not written.") from error
    write_bytes(path, (text + "\n").encode("utf-8"))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; byte for byte what safetensors would write.

    Raises:
        DiskError: as `replacing`.
        FileFormatError: a tensor type that the format does not have, metadata that is not text.
    """
    ordered = _in_file_order(tensors)
    header = build_header(layout_of(ordered), metadata)
    _write_chunks(path, chain([header], _data_chunks(ordered)))


def _write_chunks(path: str | Path, chunks: Iterable[bytes | memoryview]) -> None:
    with replacing(path) as temporary, writing(temporary) as write:
        for chunk in chunks:
            write(chunk)


@contextmanager
def writing(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A new file, and what appends to it; the disk writes while the caller makes the next bytes.

    Raises:
        OSError: no space, ...; it may be told some bytes late, but never after the end.
    """
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        since = 0
        pending: list[Future[None]] = []  # the one that was asked for last

        def write(chunk: bytes | memoryview) -> None:
            nonlocal since
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE):
                file.write(view[start : start + _PIECE])
            since += len(view)
            if since >= _BEHIND and all(one.done() for one in pending):
                since = 0
                for one in pending:
                    one.result()
                pending[:] = [pool.submit(os.fsync, file.fileno())]

        yield write
        for one in pending:
            one.result()


def write_hashed(
    path: str | Path,
    layout: FileLayout,
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """As `write_tensors`, with kohya's two hashes in the metadata, in one pass: a tensor is made,
    hashed and written while the processor's cache holds it, and only one at a time.

    Args:
        layout: every tensor's type and shape, in the file's order (`in_file_order`).
        make: name -> the tensor, contiguous on the CPU; its memory may serve for the next one.
    Returns:
        the metadata as written.
    Raises:
        DiskError: as `replacing`. What `make` raises; no file is there then.
    """
    own = (OWN_HASH,) if "ss_lcp_format" in metadata else ()
    metadata = {**metadata, **dict.fromkeys(own, "0" * 64)}
    written = {**metadata, "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    whole, legacy = hashlib.sha256(), _LegacyHash(layout, metadata)
    with replacing(path) as temporary:
        with writing(temporary) as write:
            write(build_header(layout, written))
            for name in layout:
                tensor = make(name)
                if tensor.numel():
                    chunk = raw_bytes(tensor)
                    whole.update(chunk)
                    legacy.update(chunk)
                    write(chunk)
        written |= {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()}
        written |= dict.fromkeys(own, whole.hexdigest())
        with temporary.open("r+b") as file:
            file.write(build_header(layout, written))  # of the same length
    return written


def in_file_order(layout: FileLayout) -> FileLayout:
    """As safetensors sorts: larger types first, then by name."""
    return dict(sorted(layout.items(), key=lambda item: (-_ORDER[item[1][0]], item[0].encode())))


def _in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in in_file_order(layout_of(tensors))}


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape. Raises FileFormatError for a type that no file can hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAME_OF:
            raise FileFormatError(f"{name} has the type {tensor.dtype}, which no file can hold.")
    return {name: (_NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


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


def _data_chunks(ordered: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    for tensor in ordered.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield raw_bytes(flat)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that has elements, as bytes: not a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def require_free_space(folder: str | Path, bytes_needed: int, what: str) -> None:
    """Raises DiskError unless the file system of `folder` (which may not exist yet) has room."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise DiskError(
            f"{what} needs {bytes_needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder."
        )


# ------------------------------------------------------------------------------------- hashes


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """kohya's sshs_model_hash: sha256 (hex) of the data part of the safetensors serialisation."""
    digest = hashlib.sha256()
    for chunk in _data_chunks(_in_file_order(tensors)):
        digest.update(chunk)
    return digest.hexdigest()


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """kohya's sshs_legacy_hash: first 8 hex digits of the sha256 of 64 KiB at 1 MiB of the
    serialisation with only the `ss_*` entries of `metadata`.
    """
    ordered = _in_file_order(tensors)
    digest = _LegacyHash(layout_of(ordered), metadata or {})
    for chunk in _data_chunks(ordered):
        digest.update(chunk)
        if digest.is_complete:
            break
    return digest.hexdigest()


class _LegacyHash:
    """`legacy_hash` of data that comes piece by piece."""

    START, END = 0x100000, 0x110000

    def __init__(self, layout: FileLayout, metadata: Mapping[str, str]) -> None:
        self._digest, self._position = hashlib.sha256(), 0
        self.update(build_header(layout, {k: v for k, v in metadata.items() if k[:3] == "ss_"}))

    @property
    def is_complete(self) -> bool:
        """Whether what follows does not count."""
        return self._position >= self.END

    def update(self, chunk: bytes | memoryview) -> None:
        """The next bytes of the serialisation."""
        if self.is_complete:
            return
        first, last = (max(0, place - self._position) for place in (self.START, self.END))
        self._digest.update(memoryview(chunk)[first:last])
        self._position += len(chunk)

    def hexdigest(self) -> str:
        """Its first 8 hex digits."""
        return self._digest.hexdigest()[:8]


def file_model_hash(path: str | Path) -> str:
    """sshs_model_hash of a file as it is, streamed."""
    header = read_header(path)
    return _hash_from(Path(path), header.size)


def is_as_written(path: str | Path, metadata: Mapping[str, str]) -> bool:
    """Whether the tensors of a file of ours are those that were written with its lineage."""
    recorded = metadata.get(OWN_HASH) or metadata.get("sshs_model_hash")
    return recorded is None or recorded == file_model_hash(path)


def _hash_from(path: Path, offset: int) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """sha256 (hex) of a whole file, remembered by (path, size, modification time) in the cache."""
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}).") from error
    facts = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memory = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    with suppress(FileFormatError):
        known = read_json(memory)
        if isinstance(known, dict) and facts.items() <= known.items():
            return str(known["sha256"])
    digest = _hash_from(path, 0)
    if time.time() - stat.st_mtime > 2:  # a younger file may change within the clock's tick
        with suppress(DiskError):
            write_json(memory, {**facts, "sha256": digest})
    return digest


def hash_folder(folder: str | Path) -> str:
    """sha256 (hex) over names and contents of all .safetensors and .json files below a folder: the
    identity of a model in diffusers' layout.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    files = [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json") and f.is_file()]
    for file in sorted(files, key=lambda f: f.relative_to(folder).as_posix()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def short_hash(path: str | Path) -> str:
    """kohya's ss_sd_model_hash: first 8 hex digits of the sha256 of 64 KiB at 1 MiB of a file."""
    with Path(path).open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def cache_folder() -> Path:
    """Where hashes and other things that can be made again are kept: $LCP_CACHE or
    ~/.cache/lcp_plugin.
    """
    chosen = os.environ.get("LCP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "lcp_plugin"
