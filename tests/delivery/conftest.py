"""A toy base on disk and something learned on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lora_samples import build_uneven_toy, random_adapter

from lcp_plugin.delivery.learned import Learned
from lcp_plugin.delivery.single_file import write_single_file
from lcp_plugin.sdxl.load import hush_libraries


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A toy pipeline, its diffusers folder, and the same as a single file."""
    hush_libraries()
    folder = tmp_path_factory.mktemp("base")
    pipeline: Any = build_uneven_toy()
    pipeline.save_pretrained(str(folder / "toy"))
    write_single_file(folder / "toy", folder / "toy.safetensors")
    return pipeline, folder / "toy", folder / "toy.safetensors"


@pytest.fixture(scope="module")
def learned(base: tuple[Any, Path, Path]) -> Learned:
    """Something learned in UNet (convolutions too) and both text encoders."""
    adapter = random_adapter(
        base[0],
        lambda n: ".attn" in n or ".self_attn" in n or ".mlp" in n or "conv1" in n,
        lambda i: (3, 2.0),
    )
    return Learned(adapter, {"ss_output_name": "x"})
