"""Files that are damaged or of another kind are refused, in one line and with little memory."""

from __future__ import annotations

import json
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

from lcp_plugin.errors import FileFormatError, LcpError
from lcp_plugin.formats.lora_file import lora_tensors, read_lora
from lcp_plugin.formats.tensors import read_header


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
