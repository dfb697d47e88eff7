"""Opposed parameters and overlaps, against examples worked by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lora_samples import OUT, TEXT_1, Q, factors

from lcp_plugin.adapter import Adapter
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.errors import LineageError
from lcp_plugin.evaluation.conflicts import (
    Opposition,
    block_of,
    compare_adapters,
    compare_boundaries,
    figure_two,
    measure_opposition,
    measure_overlap,
    open_boundaries,
)
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task


def row(*values: float) -> Delta:
    return Delta({Q: Dense(torch.tensor([values]))})


def test_opposition_of_one_matrix_by_hand() -> None:
    a = torch.tensor([[1.0, -2.0, 2.0, 0.0]])
    b = torch.tensor([[-3.0, -1.0, 0.0, 4.0]])
    # opposed: -3 (signs differ), 0 (sign 0 against +), 4 (against 0): ||(3, 0, 4)|| / ||a|| = 5/3
    found = measure_opposition(a, b).to_json()
    assert found["ratio"] == pytest.approx(5 / 3)
    assert found["opposed"] == 1 / 4  # only -3 * 1 < 0
    assert found["zeros"] == 2 / 4


def test_nothing_to_compare_is_none_not_a_crash() -> None:
    assert Opposition().to_json() == {"ratio": None, "opposed": None, "zeros": None}


def test_figure_two_in_both_readings_by_hand() -> None:
    # D_0 = 0, D_1 = (1, 1), D_2 = (0, 3), D_3 = (-2, 3)
    boundaries = [Delta(), row(1.0, 1.0), row(0.0, 3.0), row(-2.0, 3.0)]
    pairs = compare_boundaries(
        ["x", "y", "z"], [lambda m, d=d: d.restrict([m]) for d in boundaries], [Q]
    )
    ratios = {(p.first, p.second, p.reading): p.blocks[""].to_json()["ratio"] for p in pairs}
    # a = (1, 1), norm sqrt 2. since: b = D_2 = (0, 3): the 0 is opposed but weighs nothing
    assert ratios["x", "y", "since"] == pytest.approx(0.0)
    # after: b = (-1, 2): 1 / sqrt 2
    assert ratios["x", "y", "after"] == pytest.approx(1 / math.sqrt(2))
    # since: b = D_3 = (-2, 3): 2 / sqrt 2;  after: b = (-3, 2): 3 / sqrt 2
    assert ratios["x", "z", "since"] == pytest.approx(2 / math.sqrt(2))
    assert ratios["x", "z", "after"] == pytest.approx(3 / math.sqrt(2))
    # task y: a = (-1, 2), norm sqrt 5. since: b = D_3 - D_1 = (-3, 2); after: (-2, 0)
    assert ratios["y", "z", "since"] == pytest.approx(0.0)
    assert ratios["y", "z", "after"] == pytest.approx(0.0)  # 0 against 2: sign differs, weighs 0
    rows = figure_two(["x", "y", "z"], pairs)
    assert [r["task"] for r in rows] == ["y", "z"]
    assert rows[1]["ratios"]["after"] == pytest.approx(3 / math.sqrt(2))
    assert rows[0]["zeros"]["since"] == 1 / 2


def test_figures_of_blocks_add_up_to_the_overall_one() -> None:
    first, second = (
        Delta.of(
            Adapter({n: factors((6, 6), 2, 2.0, s + i) for i, n in enumerate((Q, OUT, TEXT_1))})
        )
        for s in (0, 10)
    )
    (pair,) = compare_adapters({"a": first, "b": second})
    blocks = {k: v for k, v in pair.blocks.items() if k}
    assert set(blocks) == {"unet.down_blocks.1", "unet.mid_block", "text_encoder"}
    total = sum(blocks.values(), Opposition())
    assert total.to_json() == pytest.approx(pair.blocks[""].to_json())
    assert 0.2 < pair.to_json()["opposed"] < 0.8


def test_a_module_that_only_one_changes_is_opposed_by_zeros() -> None:
    (pair,) = compare_adapters({"a": row(1.0, 2.0), "b": Delta()})
    assert pair.to_json()["zeros"] == 1.0
    assert pair.to_json()["ratio"] == 0.0


def test_overlap_is_one_for_the_same_space_and_zero_for_orthogonal_ones() -> None:
    eye = torch.eye(30)
    a = Stacked(eye[:, :2], eye[:2], (2,))
    b = Stacked(eye[:, 2:5] * 3, eye[2:5], (3,))
    c = Stacked(eye[:, 5:6], eye[:1] * 7, (1,))
    assert measure_overlap(a, a) == pytest.approx((1.0, 1.0))
    assert measure_overlap(a, b) == pytest.approx((0.0, 0.0))
    assert measure_overlap(a, c) == pytest.approx((1.0, 0.0))
    assert measure_overlap(Dense(a.dense()), b) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert measure_overlap(Dense(a.dense()), a) == pytest.approx((1.0, 1.0))
    assert measure_overlap(a, Dense(torch.zeros(30, 30))) == (0.0, 0.0)


def test_overlap_of_random_spaces_is_their_share_of_dimensions() -> None:
    a, b = (factors((200, 200), 10, 10.0, s) for s in (0, 1))
    (pair,) = compare_adapters({"a": Delta.of(Adapter({Q: a})), "b": Delta.of(Adapter({Q: b}))})
    assert pair.to_json()["row_overlap"] == pytest.approx(10 / 200, abs=0.02)


def test_blocks_have_short_names() -> None:
    assert block_of(Q) == "unet.down_blocks.1"
    assert block_of("unet.conv_in") == "unet"
    assert block_of(TEXT_1) == "text_encoder"


# ------------------------------------------------------------------------------------- of a run


@contextmanager
def saved_run(folder: Path, strategy_name: str) -> Iterator[tuple[Path, list[Delta]]]:
    """Three tasks of random updates under a built-in strategy; the totals behind each."""
    store = RunStore(folder, "run")
    strategy = create_strategy(strategy_name, [])
    carry = store.read_parent().carry
    totals = []
    for index in (1, 2, 3):
        task = Task(index, f"task{index}", "object", f"thing {index}", ())
        trained = Adapter({Q: factors((8, 6), 2, 2.0, index), OUT: factors((6, 6), 2, 2.0, -index)})
        carry = strategy.end_task(task, carry, trained)
        facts = {
            "strategy": {"name": strategy_name, "args": []},
            "base": {"name": "b", "hash": "h"},
        }
        store.save_task(task, trained, carry, strategy, facts)
        totals.append(carry.total)
    yield folder / "run", totals


@pytest.mark.parametrize("strategy", ["merge_init", "magmax", "naive"])
def test_a_runs_removed_carries_are_rebuilt_and_compared(tmp_path: Path, strategy: str) -> None:
    with saved_run(tmp_path, strategy) as (run, totals):
        assert not (run / "01_task1" / "carry.safetensors").exists()
        with open_boundaries(run) as (names, boundaries, modules):
            assert names == ["task1", "task2", "task3"]
            assert set(modules) == {Q, OUT}
            for module in modules:
                assert len(boundaries[0](module)) == 0
                for read, total in zip(boundaries[1:], totals, strict=True):
                    assert torch.equal(read(module)[module].dense(), total[module].dense())
            pairs = compare_boundaries(names, boundaries, modules)
        assert len(pairs) == 6


def test_a_run_of_one_task_has_nothing_to_compare(tmp_path: Path) -> None:
    with (
        pytest.raises(LineageError, match="holds 0 complete tasks"),
        open_boundaries(tmp_path / "none"),
    ):
        pass
