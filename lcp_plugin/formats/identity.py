"""What tensors, files and folders are known by: sha256 of their contents, as kohya takes it.

`sshs_model_hash` (sd-scripts, library/train_util.py) is the sha256 of the data part of the
safetensors serialisation, so it depends on the tensors only, not on the metadata.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lcp_plugin.errors import DiskError, FileFormatError
from lcp_plugin.formats.disk import cache_folder, read_json, replacing, write_json, writing
from lcp_plugin.formats.header import LEGACY_HASH, MODEL_HASH
from lcp_plugin.formats.lineage import OURS, is_ours
from lcp_plugin.formats.tensors import (
    FileLayout,
    build_header,
    data_chunks,
    order_tensors,
    raw_bytes,
    read_header,
)

OWN_HASH = f"{OURS}model_hash"  # sshs_model_hash as we wrote it: other tools renew theirs only
_CHUNK = 1 << 22


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """kohya's sshs_model_hash: sha256 (hex) of the data part of the safetensors serialisation."""
    digest = hashlib.sha256()
    for chunk in data_chunks(order_tensors(tensors)):
        digest.update(chunk)
    return digest.hexdigest()


class _LegacyHash:
    """kohya's sshs_legacy_hash, of data that comes piece by piece.

    It is the first 8 hex digits of the sha256 of 64 KiB at 1 MiB of the serialisation with only the
    `ss_*` entries of its metadata.
    """

    START, END = 0x100000, 0x110000

    def __init__(self, layout: FileLayout, metadata: Mapping[str, str]) -> None:
        self._digest, self._position = hashlib.sha256(), 0
        self.update(build_header(layout, {k: v for k, v in metadata.items() if k[:3] == "ss_"}))

    def update(self, chunk: bytes | memoryview) -> None:
        """The next bytes of the serialisation."""
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
    recorded = metadata.get(OWN_HASH) or metadata.get(MODEL_HASH)
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


def short_hash(path: str | Path) -> str:
    """kohya's ss_sd_model_hash: first 8 hex digits of the sha256 of 64 KiB at 1 MiB of a file."""
    with Path(path).open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


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
    own = (OWN_HASH,) if is_ours(metadata) else ()
    metadata = {**metadata, **dict.fromkeys(own, "0" * 64)}
    written = {**metadata, MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
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
        written |= {MODEL_HASH: whole.hexdigest(), LEGACY_HASH: legacy.hexdigest()}
        written |= dict.fromkeys(own, whole.hexdigest())
        with temporary.open("r+b") as file:
            file.write(build_header(layout, written))  # of the same length
    return written
