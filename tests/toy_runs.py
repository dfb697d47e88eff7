"""Runs on a toy base: small pictures, their TOML, and what a run left, as tests look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toml
import torch
from PIL import Image, ImageDraw

from lcp_plugin.adapter import Adapter
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.store.run_folder import RunStore

COLOURS = ("crimson", "teal", "gold", "navy", "orchid", "black")


def draw_pictures(folder: Path, count: int = 3, colour: str = "crimson", side: int = 64) -> Path:
    """`count` small pictures of a disc of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (side, side), "white")
        box = (8 + 4 * i, 10, 40 + 4 * i, 46)
        ImageDraw.Draw(image).ellipse(box, fill=colour)
        image.save(folder / f"{i:02d}.png")
    return folder


def task_table(index: int, **more: Any) -> dict[str, Any]:
    """One [[tasks]] entry on the pictures of `pictures`."""
    return {
        "name": f"disc{index}",
        "kind": "object",
        "concept": f"sks{index} disc",
        "image_dir": f"disc{index}",
        **more,
    }


BASICS: Mapping[str, Any] = {
    "strategy": "merge_init",  # draws nothing: the default would, before each task but the first
    "network_dim": 2,
    "network_alpha": 2,
    "network_train_unet_only": True,
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "max_train_steps": 3,
    "learning_rate": 1e-2,
    "optimizer_type": "AdamW",
    "seed": 7,
    "samples_per_task": 0,
    "resume_every_n_steps": 2,
}


def write_run(
    folder: Path,
    base: Path,
    data: Path,
    name: str,
    tasks: Sequence[int | dict[str, Any]] = (0, 1),
    **options: Any,
) -> Path:
    """A run's TOML in `folder`, whose output goes to `folder`/out."""
    table: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder / "out"),
        "output_name": name,
        "data_root": str(data),
        **BASICS,
        **options,
    }
    table["tasks"] = [t if isinstance(t, dict) else task_table(t) for t in tasks]
    path = folder / f"{name}.toml"
    path.write_text(toml.dumps(table), encoding="utf-8")
    return path


def draw_two(folder: Path) -> Path:
    """Two folders of small pictures below `folder`: disc0, disc1."""
    for name, colour in (("disc0", "crimson"), ("disc1", "teal")):
        draw_pictures(folder / name, colour=colour)
    return folder


def first_adapter(run: Any) -> Adapter:
    adapter: Adapter = run.store.folders()[0].read_adapter()
    return adapter


def rates_of(run: Any) -> list[float]:
    return [step["lr"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


def losses_of(run: Any) -> list[float]:
    return [step["loss"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


def names_in(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


STRATEGIES = ("naive", "merge_init", "merge_ortho_init", "magmax", "recall")


def under(strategy: str) -> dict[str, Any]:
    """The options of a run under a strategy, with arguments that keep its own work small."""
    short = ["images=2", "sample_steps=2"] if strategy == "recall" else []
    return {"strategy": strategy, "strategy_args": short}


def read_all(store: RunStore) -> dict[str, torch.Tensor]:
    """Every tensor that a run left in its last task folder and its deliverable."""
    folder = store.folders()[-1].path
    found = {}
    for path in (folder / "adapter.safetensors", folder / "carry.safetensors", store.deliverable):
        for key, tensor in read_tensors(path).items():
            found[f"{path.name if path != store.deliverable else 'deliverable'}:{key}"] = tensor
    return found


def read_samples(store: RunStore) -> dict[str, bytes]:
    """Every sample that a run drew, and the grid, as pixels."""
    found = {}
    for path in sorted((store.root / "samples").rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(store.root).as_posix()] = image.tobytes()
    return found


def assert_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:3]
