"""Two tasks and the boundary between them at real size, each strategy, base in bf16, at 256 px.

Opt-in (`pytest --run_slow tests/run/test_real_size.py`): for MagMax the real UNet needs about
20 GB of memory, and each strategy 20 GB of disk and some minutes. Weights are random.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from benchmarks.measure import Child, run_child, run_part
from toy_runs import draw_pictures

from lcp_plugin.sdxl.stored import is_native
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tiny.architecture import build_topo, save_pipeline

ROOT = Path(__file__).parents[2]
STRATEGIES = ("naive", "merge_init", "merge_ortho_init", "magmax")
LIMIT_MB = 9000.0  # without what the strategy carries before, across and behind the boundary
SCRIPT = """
import json, sys
from benchmarks.measure import AnonymousPeak, peak_mb
from lcp_plugin.cli import main
with AnonymousPeak(0.05) as anonymous:
    status = main(sys.argv[1:])
print()
print(json.dumps({"peak_mb": peak_mb(), "anonymous_mb": anonymous.mb}))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def topo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topo") / "base"
    save_pipeline(build_topo(), folder)
    return folder


@pytest.fixture(scope="module")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    run_part("build_base", str(folder))
    yield folder
    shutil.rmtree(folder)


def precision() -> dict[str, str]:
    """A base in bf16: computed in it where the CPU can, else in fp32, there the faster by far."""
    if is_native(torch.bfloat16):
        return {"mixed_precision": "bf16"}
    return {"mixed_precision": "no", "base_dtype": "bf16"}


def learn_two(base: Path, folder: Path, strategy: str, rank: int) -> tuple[Child, RunStore]:
    """A run of two tasks, one step each, in a process of its own."""
    table: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder / "out"),
        "output_name": strategy,
        "data_root": str(folder),
        "strategy": strategy,
        "resolution": 256,
        "enable_bucket": False,
        **precision(),
        "save_precision": "bf16",
        "gradient_checkpointing": True,
        "network_dim": rank,
        "network_alpha": rank,
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "optimizer_type": "AdamW",
        "learning_rate": 1e-4,
        "max_train_steps": 1,
        "samples_per_task": 0,
        "resume_every_n_steps": 0,
        "keep_carries": "all",  # to weigh them
        "seed": 0,
    }
    table["tasks"] = []
    for name, colour in (("one", "teal"), ("two", "crimson")):
        draw_pictures(folder / name, count=1, colour=colour, side=256)
        table["tasks"].append(
            {"name": name, "kind": "object", "concept": f"sks {name}", "image_dir": name}
        )
    config = folder / "run.toml"
    config.write_text(toml.dumps(table), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = run_child([sys.executable, "-c", SCRIPT, "--config", str(config)], env)
    return child, RunStore(folder / "out", strategy)


def report(child: Child, store: RunStore, capsys: pytest.CaptureFixture[str]) -> float:
    """Prints what the run cost; returns the MB that the strategy carries: what it holds on both
    sides of a boundary, where the next delta is formed from the last one."""
    folders = store.folders()
    kept = [f.path / f"{part}.safetensors" for f in folders for part in ("carry", "strategy")]
    carry = sum(file.stat().st_size for file in kept if file.is_file()) / 2**20
    facts = {
        "run": store.name,
        "seconds": round(child.wall),
        **{key: round(value) for key, value in child.facts.items()},
        "carry_mb": round(carry),
        "deliverable_mb": round(store.deliverable.stat().st_size / 2**20),
        "at_boundary": folders[1].lineage["training"]["fused"],
    }
    with capsys.disabled():
        print("\n" + json.dumps(facts))
    return carry


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_topo_learns_two_tasks_in_bf16(
    topo_base: Path, tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child, store = learn_two(topo_base, tmp_path, strategy, 16)
    carry = report(child, store, capsys)
    assert len(store.folders()) == 2
    assert child.peak_mb < LIMIT_MB + carry
    assert store.folders()[1].lineage["training"]["fused"]["rounding_share"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sdxl_learns_two_tasks_within_nine_gigabytes_and_its_carry(
    sdxl_base: Path, tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child, store = learn_two(sdxl_base, tmp_path, strategy, 64)
    carry = report(child, store, capsys)
    folders = store.folders()
    shutil.rmtree(tmp_path / "out")  # gigabytes
    assert len(folders) == 2
    assert folders[1].lineage["training"]["fused"]["rounding_share"] < 0.01
    assert child.peak_mb < LIMIT_MB + carry
