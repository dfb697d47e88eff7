"""Two CPU processes (torchrun, gloo) reach what one process reaches with twice the accumulation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import draw_two, write_run
from two_processes import COMMON, MODULE, ROOT, attempt, launch

from lcp_plugin.store.run_folder import RunStore

SGD: dict[str, Any] = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0}
WITNESS = """
import atexit, os, pathlib, sys

@atexit.register
def tell_whether_the_group_lives():
    torch = sys.modules.get("torch")
    if torch is not None and "RANK" in os.environ:
        lives = torch.distributed.is_initialized()
        (pathlib.Path(__file__).parent / f"rank{os.environ['RANK']}").write_text(str(lives))
"""


def witness(folder: Path) -> dict[str, str]:
    """An environment in which each rank, as its interpreter ends, tells of its process group."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITNESS, encoding="utf-8")
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def groups_alive(folder: Path) -> list[str]:
    """What the ranks told, in their order."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("rank*"))]


@pytest.fixture(scope="module")
def pair(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, Path]:
    """A finished run of two tasks with SGD in two processes, and what its ranks told."""
    folder = tmp_path_factory.mktemp("pair")
    config = write_run(folder, toy_base, draw_two(folder / "data"), "pair", **COMMON, **SGD)
    launch(config, **witness(folder / "witness"))
    return RunStore(folder / "out", "pair"), folder / "witness"


def assert_ran_in_two_processes(store: RunStore) -> None:
    folders = store.folders()
    assert len(folders) == 2
    assert [f.lineage["session"]["processes"] for f in folders] == [2, 2]


def test_two_processes_with_sgd_reach_the_weights_of_one_with_twice_the_accumulation(
    pair: tuple[RunStore, Path], train: Callable[..., Any]
) -> None:
    two, single = pair[0], train("single", **COMMON, **SGD, gradient_accumulation_steps=2).store
    assert_ran_in_two_processes(two)
    for ours, wanted in zip(two.folders(), single.folders(), strict=True):
        a, b = ours.read_adapter(), wanted.read_adapter()
        moved = False
        for name, factors in b.items():
            torch.testing.assert_close(a[name].up, factors.up, rtol=0, atol=1e-5)
            torch.testing.assert_close(a[name].down, factors.down, rtol=0, atol=1e-5)
            moved = moved or float(factors.up.abs().max()) > 1e-3
        assert moved, "nothing was learned, so nothing was compared"


def test_two_processes_with_adamw_reach_the_delta_of_one_with_twice_the_accumulation(
    write_config: Callable[..., Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    launch(write_config("pair", **COMMON, optimizer_type="AdamW"), through=MODULE)
    single = train("single", **COMMON, optimizer_type="AdamW", gradient_accumulation_steps=2).store
    two = RunStore(tmp_path / "out", "pair")
    assert_ran_in_two_processes(two)
    ours, wanted = (s.folders()[-1].read_carry().total for s in (two, single))
    difference = ours + wanted.weighted(-1.0)
    assert wanted.norm() > 0
    assert difference.norm() / wanted.norm() < 1e-3  # a sign of a tiny gradient may turn
    assert two.deliverable.is_file()


def test_a_finished_run_ends_its_process_group_before_the_interpreter(
    pair: tuple[RunStore, Path],
) -> None:
    store, told = pair
    assert groups_alive(told) == ["False", "False"]
    assert_ran_in_two_processes(store)


def test_an_error_ends_the_process_group_too_and_is_no_abort(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    environment = witness(tmp_path / "witness")
    prev = str(tmp_path / "nothing.safetensors")
    done = attempt(write_config("pair", prev=prev, **COMMON), **environment)
    assert done.returncode != 0
    assert f"error: --prev {prev} does not exist" in done.stderr
    assert "SIGABRT" not in done.stderr
    # the launcher may stop the second process before it has told
    assert set(groups_alive(tmp_path / "witness")) == {"False"}
