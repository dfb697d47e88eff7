"""Files: headers are checked before anything is allocated, writes are all or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lora_samples import mixed_adapter

from lcp_plugin.errors import DiskError, FileFormatError, LcpError, NumericError
from lcp_plugin.formats.disk import (
    read_json,
    remove_temporary_files,
    replacing,
    require_free_space,
    write_json,
    writing,
)
from lcp_plugin.formats.identity import (
    file_model_hash,
    hash_file,
    hash_tensors,
    legacy_hash,
    write_hashed,
)
from lcp_plugin.formats.lora_file import lora_tensors, read_lora
from lcp_plugin.formats.tensors import (
    DTYPES,
    in_file_order,
    layout_of,
    read_header,
    read_tensors,
    write_tensors,
)

METADATA = {"ss_network_dim": "3", "other": 'ü "quoted"\n\\ \x01'}


def every_type() -> dict[str, torch.Tensor]:
    """A matrix and a number of each type that a file can hold, and a tensor without elements."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.zeros(0, 4)}
    for i, (name, (_, dtype)) in enumerate(DTYPES.items()):
        values = torch.randint(0, 2, (3, 5), generator=generator)
        tensors[f"k{i * 7 % 16}.{name}"] = values.to(torch.float32).to(dtype)
        tensors[f"a{i}"] = torch.tensor(1.0).to(dtype)
    return tensors


# ------------------------------------------------------------------------------- round trips


def test_a_written_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    metadata = {"one": "entry"}  # safetensors keeps no order between several
    write_tensors(tmp_path / "a.safetensors", every_type(), metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.torch.save(
        every_type(), metadata
    )


def test_header_says_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = every_type()
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, METADATA)
    header = read_header(path)
    assert header.metadata == METADATA
    assert {n: (i.shape, i.torch_dtype) for n, i in header.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in tensors.items()
    }
    assert header.size + header.data_size == path.stat().st_size


def test_tensors_come_back_bit_for_bit_and_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.tensor(7)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = read_tensors(tmp_path / "a.safetensors", ["c", "a"])
    assert list(back) == ["c", "a"]
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    with pytest.raises(FileFormatError, match="does not hold missing"):
        read_tensors(tmp_path / "a.safetensors", ["missing"])


def test_a_transposed_tensor_is_written_as_it_looks(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"t": matrix.T})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["t"], matrix.T)


def test_json_comes_back_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, 2.5, None]}
    with pytest.raises(NumericError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == {"ü": [1, 2.5, None]}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "", "\xff"])
def test_damaged_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileFormatError) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- hashes


def kohya_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """As reference/kohya.md 3.2 states them, on safetensors' own serialisation."""
    kept = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    whole = safetensors.torch.save(tensors, kept)
    start = 8 + int.from_bytes(whole[:8], "little")
    legacy = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(whole[start:]).hexdigest(), legacy


@pytest.mark.parametrize("elements", [10, 270_000, 400_000])  # before, around and past 1 MiB
def test_hashes_are_kohyas(tmp_path: Path, elements: int) -> None:
    tensors = {"w": torch.randn(elements), "alpha": torch.tensor(4.0), "h": torch.ones(3).half()}
    wanted = kohya_hashes(tensors, METADATA)
    assert (hash_tensors(tensors), legacy_hash(tensors, METADATA)) == wanted
    write_tensors(tmp_path / "a.safetensors", tensors, METADATA)
    assert file_model_hash(tmp_path / "a.safetensors") == wanted[0]


def test_model_hash_does_not_depend_on_metadata(tmp_path: Path) -> None:
    for name, metadata in (("a", {}), ("b", METADATA)):
        write_tensors(tmp_path / name, every_type(), metadata)
    assert file_model_hash(tmp_path / "a") == file_model_hash(tmp_path / "b")


def test_a_file_hash_is_remembered_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"first")
    os.utime(file, ns=(0, 10**18))
    first = hashlib.sha256(b"first").hexdigest()
    assert hash_file(file) == first
    file.write_bytes(b"other")
    os.utime(file, ns=(0, 10**18))
    assert hash_file(file) == first  # same size, same time: not read again
    os.utime(file, ns=(0, 2 * 10**18))
    assert hash_file(file) == hashlib.sha256(b"other").hexdigest()


def test_a_file_younger_than_the_clocks_tick_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"new")
    hash_file(tmp_path / "a")
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------ full disk, kills


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "old.safetensors"
    write_tensors(path, {"old": torch.ones(4)})
    return path


def assert_untouched(path: Path) -> None:
    assert torch.equal(read_tensors(path)["old"], torch.ones(4))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(
    old_file: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskError, match=os.strerror(code)):
            write_tensors(old_file, {"new": torch.zeros(9)})
    assert_untouched(old_file)


def test_a_file_size_limit_in_the_middle_of_a_write_leaves_the_old_file_whole(
    old_file: Path,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="untouched"):
            write_tensors(old_file, {"new": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(old_file)


def test_an_error_while_the_new_file_is_checked_leaves_the_old_one_whole(old_file: Path) -> None:
    def write_and_refuse() -> None:
        with replacing(old_file) as temporary:
            temporary.write_bytes(b"half")
            raise FileFormatError("read back and refused.")

    with pytest.raises(FileFormatError):
        write_and_refuse()
    assert_untouched(old_file)


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(old_file: Path) -> None:
    with replacing(old_file) as temporary:
        temporary.write_bytes(b"x")
        leftover = old_file.parent / temporary.name.replace(str(os.getpid()), "1")
    leftover.write_bytes(b"half")
    (old_file.parent / ".mine.tmp").write_bytes(b"not ours")
    remove_temporary_files(old_file.parent)
    assert {p.name for p in old_file.parent.iterdir()} == {old_file.name, ".mine.tmp"}


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1, "the run")
    with pytest.raises(DiskError, match=r"the run needs 1000000000\.0 GB"):
        require_free_space(tmp_path / "not" / "yet", 10**18, "the run")


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + b"\0" * 100, "convert it"),
        (pickle.dumps({"a": 1}), "convert it"),
        (pickle.dumps({"a": 1}, protocol=0), "not a safetensors file"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (b"", "not a safetensors file"),
    ],
)
def test_foreign_files_are_named_for_what_they_are(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        read_header(path)


def test_a_torch_checkpoint_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    for modern in (True, False):
        path = tmp_path / "model.ckpt"
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=modern)
        with pytest.raises(FileFormatError, match=r"safetensors\.torch\.save_file"):
            read_header(path)


def test_missing_files_and_folders_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_header(path)


def whole_lora() -> bytes:
    return safetensors.torch.save(lora_tensors(mixed_adapter()))


def with_header(change: dict[str, dict[str, object]]) -> bytes:
    """The LoRA file with entries of its header changed."""
    whole = whole_lora()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for name, entry in change.items():
        header[name] = {**header.get(name, {}), **entry}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """Over two hundred ways in which a LoRA file can be broken, from a fixed seed."""
    whole = whole_lora()
    size = int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for cut in draw.sample(range(len(whole)), 80):
        yield f"truncated at {cut}", whole[:cut]
    for place in draw.sample(range(8 + size), 120):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"bit flipped at {place}: {bytes(flipped[max(0, place - 8) : place + 8])!r}", flipped
    for size_claimed in (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1):
        yield f"header of {size_claimed}", size_claimed.to_bytes(8, "little") + whole[8:]
    name = next(n for n in lora_tensors(mixed_adapter()) if n.endswith("lora_down.weight"))
    entry = json.loads(whole[8 : 8 + size])[name]
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    for wrong in (
        {"shape": [2**40, 2**40]},
        {"shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        {"shape": shape[::-1]},
        {"shape": [-shape[0], -shape[1]]},
        {"shape": [True, end - start]},
        {"shape": [*shape, 1]},
        {"shape": "big"},
        {"shape": [1.5, 2]},
        {"shape": [[[]]]},
        {"dtype": "F64"},
        {"dtype": "PICKLE"},
        {"dtype": None},
        {"dtype": "I32"},
        {"data_offsets": [start + 4, end + 4]},
        {"data_offsets": [end, start]},
        {"data_offsets": [start]},
        {"data_offsets": [-4, end - start - 4]},
        {"data_offsets": [2**70, 2**70 + end - start]},
        {"extra": 1},
    ):
        yield f"entry {wrong}", with_header({name: wrong})
    for metadata in ({"a": 1}, {"a": {"b": "c"}}, {"a": None}):
        yield f"metadata {metadata}", with_header({"__metadata__": metadata})
    for text in (b"[]", b"{}", b"null", b'{"a":' * 60_000, b'{"a":NaN}', b'{"\\ud800":{}}'):
        yield f"header {text[:20]!r}", len(text).to_bytes(8, "little") + text
    for value in (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"):  # NaN, -inf in fp32
        at = 8 + size + start
        yield f"value {value!r}", whole[:at] + value + whole[at + 4 :]
    yield "trailing bytes", whole + b"\0"
    yield "a pickle", pickle.dumps({"lora": [1.0] * 100})
    yield "a zip", b"PK\x03\x04" + whole


def test_over_two_hundred_damaged_files_are_each_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole_lora())
    read_lora(path)  # the undamaged one is fine
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said: dict[str, str] = {}
    for how, content in damaged_files():
        path.write_bytes(content)
        try:
            read_lora(path)
            said[how] = "accepted"
        except LcpError as error:
            said[how] = str(error)
    assert len(said) > 200
    assert [how for how, words in said.items() if words == "accepted"] == []
    assert [how for how, words in said.items() if "\n" in words or len(words) > 500] == []
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 64 * 1024


def test_a_huge_declared_size_allocates_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    content = with_header({"x": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}})
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(content) + 200_000


def test_one_pass_writes_what_hashing_first_would_have_written(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(700, 900),
        "a": torch.randn(5, 3).to(torch.bfloat16),
        "c": torch.tensor(4.0),
        "none": torch.zeros(0, 3),
    }
    metadata = {"ss_network_dim": "4", "about": "x"}
    hashes = {
        "sshs_model_hash": hash_tensors(tensors),
        "sshs_legacy_hash": legacy_hash(tensors, metadata),
    }
    write_tensors(tmp_path / "two", tensors, {**metadata, **hashes})
    layout = in_file_order(layout_of(tensors))
    written = write_hashed(tmp_path / "one", layout, tensors.__getitem__, metadata)
    assert written == {**metadata, **hashes}
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_tensor_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    def make(name: str) -> torch.Tensor:
        raise NumericError(name)

    with pytest.raises(NumericError, match="a"):
        write_hashed(tmp_path / "file", {"a": ("F32", (2,))}, make, {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_behind_the_writer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lcp_plugin.formats.disk._BEHIND", 10)
    monkeypatch.setattr("lcp_plugin.formats.disk.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"), writing(tmp_path / "file") as write:
        write(b"0123456789")
