"""An adapter fused into a weights file, each way in a process of its own."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Clock, print_facts
from lcp_plugin.delivery.fusing import component_slots, fuse_file
from lcp_plugin.formats.disk import replacing
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.tensors import read_header


def fuse_streamed(folder: str) -> None:
    """Streamed, one tensor at a time; what is lost by rounding is measured as well."""
    path = Path(folder)
    clock = Clock()
    change = read_lora(path / "adapter.safetensors").change
    source = path / "unet.safetensors"
    slots = component_slots(read_header(source), "unet", change)
    with replacing(path / "fused.safetensors") as temporary:
        fused = fuse_file(source, temporary, slots, change)
    assert fused.modules == len(change.delta)
    spent = clock.read()
    print_facts(cpu=spent.cpu, wall=spent.wall)


def fuse_whole(folder: str) -> None:
    """All in memory."""
    from safetensors.torch import load_file, save_file

    path = Path(folder)
    clock = Clock()
    tensors = {k: v.clone() for k, v in load_file(path / "unet.safetensors").items()}
    for name, factors in read_lora(path / "adapter.safetensors").adapter.items():
        key = f"{name.removeprefix('unet.')}.weight"
        tensors[key] = (tensors[key].float() + factors.update()).to(tensors[key].dtype)
    save_file(tensors, path / "whole.safetensors")
    spent = clock.read()
    print_facts(cpu=spent.cpu, wall=spent.wall)
