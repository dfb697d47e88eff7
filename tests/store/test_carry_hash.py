"""A carry's hash: of its file, taken once of each value, on a thread of its own where asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_values import make_task, random_adapter

from lcp_plugin.delta import Delta
from lcp_plugin.formats.identity import file_model_hash, hash_tensors
from lcp_plugin.formats.tensors import write_tensors
from lcp_plugin.hooks import Carry
from lcp_plugin.store import carries


def test_it_is_the_hash_of_the_carry_file_and_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(1)
    taken: list[int] = []

    def count(tensors: dict[str, object]) -> str:
        taken.append(len(tensors))
        return hash_tensors(tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(carries, "hash_tensors", count)
    carry = Carry().after(make_task(1), Delta.of(adapter))
    with carries.hashing(carry):
        pass
    write_tensors(tmp_path / "carry.safetensors", carries.carry_to_tensors(carry))
    assert carries.hash_carry(carry) == file_model_hash(tmp_path / "carry.safetensors")
    assert len(taken) == 1
    noted = carry.noting(steps=3)  # another value
    assert carries.hash_carry(noted) == carries.hash_carry(carry)
    other = Carry().after(make_task(1), Delta(), adapter)
    assert carries.hash_carry(other) != carries.hash_carry(carry)
