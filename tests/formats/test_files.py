"""Files: headers are checked before anything is allocated, writes are all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lcp_plugin.errors import DiskError, FileFormatError, NumericError
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
    write_hashed,
)
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
    """The formulas of reference/kohya.md 3.2, on safetensors' own serialisation."""
    kept = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    whole = safetensors.torch.save(tensors, kept)
    start = 8 + int.from_bytes(whole[:8], "little")
    legacy = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(whole[start:]).hexdigest(), legacy


@pytest.mark.parametrize("elements", [10, 270_000, 400_000])  # before, around and past 1 MiB
def test_hashes_are_kohyas(tmp_path: Path, elements: int) -> None:
    tensors = {"w": torch.randn(elements), "alpha": torch.tensor(4.0), "h": torch.ones(3).half()}
    wanted = kohya_hashes(tensors, METADATA)
    layout = in_file_order(layout_of(tensors))
    written = write_hashed(tmp_path / "b.safetensors", layout, tensors.__getitem__, METADATA)
    assert (hash_tensors(tensors), written["sshs_legacy_hash"]) == wanted
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


def test_one_pass_writes_what_hashing_first_would_have_written(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(700, 900),
        "a": torch.randn(5, 3).to(torch.bfloat16),
        "c": torch.tensor(4.0),
        "none": torch.zeros(0, 3),
    }
    metadata = {"ss_network_dim": "4", "about": "x"}
    names = ("sshs_model_hash", "sshs_legacy_hash")
    hashes = dict(zip(names, kohya_hashes(tensors, metadata), strict=True))
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
