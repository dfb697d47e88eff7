"""The toy base and someone's LoRA on it, for what sd-scripts would do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lora_samples import random_adapter

from lcp_plugin.adapter import Adapter
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.sdxl.load import hush_libraries


@pytest.fixture(scope="module")
def toy() -> Any:
    from lcp_plugin.tiny.architecture import build_toy

    hush_libraries()
    return build_toy()


@pytest.fixture
def parent(tmp_path: Path, toy: Any) -> tuple[str, Adapter]:
    """Someone's LoRA on UNet and text encoders, rank 3, alpha 6."""
    adapter = random_adapter(
        toy, lambda n: ".attn" in n or ".self_attn" in n, lambda i: (3, 6.0), size=0.1
    )
    write_lora(tmp_path / "parent.safetensors", adapter, {"ss_output_name": "boots"})
    return str(tmp_path / "parent.safetensors"), adapter
