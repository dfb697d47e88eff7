"""MagMax at a boundary, each way in its own process: from file to file, and on whole models."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.measure import AnonymousPeak, Clock, print_facts
from lcp_plugin.delivery.streaming import select_files


def select_streamed(folder: str) -> None:
    """Adapter and carry to a new carry."""
    path = Path(folder)
    with AnonymousPeak() as peak:
        clock = Clock()
        select_files(
            path / "adapter.safetensors", path / "carry.safetensors", path / "after.safetensors"
        )
        spent = clock.read()
    print_facts(cpu=spent.cpu, wall=spent.wall, anonymous_mb=peak.mb)


def subtract_models(folder: str) -> None:
    """Whole models in memory: two task vectors, the larger entry of each, a new model saved.

    Written after the description of the authors' code: state dicts of the base, of the merged model
    so far and of the one just trained are loaded, subtracted, compared and added to the base.
    """
    from safetensors.torch import load_file, save_file

    path = Path(folder)
    with AnonymousPeak() as peak:
        clock = Clock()
        base, merged, trained = (
            {k: v.clone() for k, v in load_file(path / f"{name}.safetensors").items()}
            for name in ("base", "merged", "trained")
        )
        newest = {key: trained[key].float() - merged[key].float() for key in base}
        older = {key: merged[key].float() - base[key].float() for key in base}
        chosen = {
            key: torch.where(newest[key].abs() >= older[key].abs(), newest[key], older[key])
            for key in base
        }
        result = {key: (base[key].float() + chosen[key]).to(base[key].dtype) for key in base}
        save_file(result, path / "result.safetensors")
        spent = clock.read()
    print_facts(cpu=spent.cpu, wall=spent.wall, anonymous_mb=peak.mb)
