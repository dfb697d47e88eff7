"""Caches on disk never give back what is damaged, foreign or not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcp_plugin.data.caches import DiskCache, check_finite, make_key
from lcp_plugin.errors import NumericError
from lcp_plugin.formats.tensors import write_tensors

KEY = make_key("vae", "image")


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.store(KEY, {"latents": torch.arange(6.0).view(2, 3).t()})
    loaded = cache.load(KEY)
    assert loaded is not None
    assert torch.equal(loaded["latents"], torch.arange(6.0).view(2, 3).t())


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.store(KEY, {"latents": torch.ones(1)})
    assert cache.load(make_key("another vae", "image")) is None


def test_a_truncated_file_is_as_good_as_none(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.store(KEY, {"latents": torch.ones(100)})
    path = cache.path(KEY)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-10])
    assert cache.load(KEY) is None


def test_nan_on_disk_is_as_good_as_none(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    path = cache.path(KEY)
    assert path is not None
    path.parent.mkdir(parents=True)
    write_tensors(path, {"latents": torch.tensor([1.0, float("nan")])})
    assert cache.load(KEY) is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = DiskCache(None)
    cache.store(KEY, {"latents": torch.ones(1)})
    assert cache.load(KEY) is None


def test_a_fresh_nan_names_what_was_encoded_and_the_remedy() -> None:
    bad = {"latents": torch.tensor([float("inf")])}
    with pytest.raises(NumericError, match="image a.png: its latents hold NaN.*no_half_vae"):
        check_finite(bad, "image a.png", "use --no_half_vae")


def test_keys_tell_parts_apart() -> None:
    assert make_key("ab", "c") != make_key("a", "bc")
