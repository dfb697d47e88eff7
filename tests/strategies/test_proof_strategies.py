"""Five published methods as strategies, through the real trainer over two tasks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proof_strategies
import pytest
import torch
from torch import Tensor
from toy_values import assert_close, dense_delta, dense_updates

from lcp_plugin.adapter import Adapter
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.registry import check_plugin
from lcp_plugin.store.task_folder import TaskFolder

Train = Callable[..., Any]
PROOFS = ("CLora", "OnlineEwc", "SelfDistillation", "Slao", "FrozenA")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


def run_proof(train: Train, proof: str, *args: str, **options: Any) -> list[TaskFolder]:
    """The task folders of a run over two tasks, all carries kept."""
    name = "_".join([proof, *args]).replace("=", "").replace(".", "")
    run = train(
        options.pop("output_name", name),
        strategy=f"proof_strategies:{proof}",
        strategy_args=list(args),
        **{"keep_carries": "all", **options},
    )
    folders: list[TaskFolder] = run.store.folders()
    return folders


def penalties(folder: TaskFolder) -> list[float]:
    """What the strategy added to the loss, step by step, in a task."""
    steps = read_steps(folder.path.parent / "logs" / "steps.jsonl")
    return [s["objective"] - s["loss"] for s in steps if s["task_index"] == folder.index]


def overlap(before: TaskFolder, after: TaskFolder) -> float:
    """sqrt(sum || |D_1| * U_2 ||^2) in float64."""
    learned = dense_delta(before.read_carry().total)
    update = dense_updates(after.read_adapter())
    return math.sqrt(sum(float((learned[n].abs() * update[n]).square().sum()) for n in update))


@pytest.mark.parametrize("proof", PROOFS)
def test_each_proof_fits_in_forty_lines_and_in_the_hooks(proof: str) -> None:
    cls = getattr(proof_strategies, proof)
    assert len(inspect.getsource(cls).splitlines()) <= 40
    assert "arXiv" in (inspect.getdoc(cls) or "")
    check_plugin(proof_strategies.Strategy, cls)  # type: ignore[type-abstract]


def test_c_loras_penalty_reaches_the_gradients_and_keeps_updates_off_what_was_learned(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[float] = []
    original = proof_strategies.CLora.before_backward

    def watched(self: Any, step: Any, loss: Tensor) -> Tensor:
        total = original(self, step, loss)
        if total is not loss:
            ups = [up for _, up in step.parameters.values()]
            found = torch.autograd.grad(total - loss, ups, retain_graph=True)
            gradients.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
        return total

    monkeypatch.setattr(proof_strategies.CLora, "before_backward", watched)
    options = {"max_train_steps": 6}
    free = run_proof(train, "CLora", "weight=0", **options)
    assert gradients == [0.0] * 6  # the second task's steps, weight 0
    gradients.clear()
    held = run_proof(train, "CLora", "weight=1e6", **options)
    assert penalties(held[0]) == [0.0] * 6
    assert gradients[0] == 0  # B = 0
    assert all(g > 0 for g in gradients[1:])
    assert all(p > 0 for p in penalties(held[1])[1:])
    assert overlap(*held) < 0.5 * overlap(*free)
    total = dense_delta(held[1].read_carry().total)
    first, second = (dense_updates(f.read_adapter()) for f in held)
    assert_close(total, {n: first[n] + second[n] for n in first})  # it merges as merge_init does


def test_online_ewcs_fisher_information_is_saved_loaded_and_holds_the_factors(
    train: Train,
) -> None:
    def distance(folders: list[TaskFolder]) -> float:
        """How far the second task moved, in the first one's Fisher metric."""
        state, after = folders[0].read_state(), folders[1].read_adapter()
        moved = 0.0
        for name, factors in after.items():
            for part, value in (("A", factors.down), ("B", factors.up)):
                fisher, anchor = (state[f"{p}/{name}.{part}"] for p in ("fisher", "anchor"))
                moved += float((fisher * (value - anchor).square()).double().sum())
        return moved

    free = run_proof(train, "OnlineEwc", "weight=0", max_train_steps=6)
    held = run_proof(train, "OnlineEwc", "weight=1e8", max_train_steps=6)
    first = held[0].read_state()
    assert all(bool((t >= 0).all()) for key, t in first.items() if key.startswith("fisher/"))
    assert any(bool(t.any()) for key, t in first.items() if key.startswith("fisher/"))
    adapter = held[0].read_adapter()
    for name, factors in adapter.items():
        assert torch.equal(first[f"anchor/{name}.A"], factors.down)
        assert torch.equal(first[f"anchor/{name}.B"], factors.up)
    assert penalties(held[0]) == [0.0] * 6
    assert penalties(held[1])[0] == 0  # theta starts at theta*
    assert all(p > 0 for p in penalties(held[1])[1:])
    assert distance(held) < 0.5 * distance(free)


def test_online_ewc_chains_with_its_state_as_one_run_would(train: Train) -> None:
    whole = run_proof(train, "OnlineEwc", "weight=100")
    first = run_proof(train, "OnlineEwc", "weight=100", output_name="first", tasks=(0,))
    second = run_proof(
        train,
        "OnlineEwc",
        "weight=100",
        output_name="second",
        tasks=(1,),
        prev=str(first[0].path),
    )
    for file in ("adapter", "carry", "strategy"):
        a, b = (read_tensors(f[-1].path / f"{file}.safetensors") for f in (whole, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_self_distillation_starts_at_the_carry_and_stays_nearer_to_it(train: Train) -> None:
    free = run_proof(train, "SelfDistillation", "weight=0", max_train_steps=6)
    held = run_proof(train, "SelfDistillation", "weight=30", max_train_steps=6)
    for folder in held:
        added = penalties(folder)
        assert abs(added[0]) < 1e-6  # law 3: step 0 predicts what the carry predicts
        assert all(p > 0 for p in added[1:])

    def norm(folder: TaskFolder) -> float:
        return math.sqrt(sum(float(u.square().sum()) for u in update(folder).values()))

    def update(folder: TaskFolder) -> dict[str, Tensor]:
        return dense_updates(folder.read_adapter())

    assert norm(held[1]) < norm(free[1])


def test_slao_starts_from_an_orthogonal_a_and_merges_b_by_one_over_root_t(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Adapter] = []
    original = proof_strategies.Slao.begin_task

    def watched(self: Any, task: Any, carry: Any, spec: Any) -> Any:
        start = original(self, task, carry, spec)
        starts.append(start.adapter)
        return start

    monkeypatch.setattr(proof_strategies.Slao, "begin_task", watched)
    folders = run_proof(train, "Slao")
    first, second = (f.read_adapter() for f in folders)
    for name, start in starts[1].items():
        rows = start.down.double()
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-6)
        before = first[name].down.double()  # the same row space
        assert torch.allclose(before @ rows.T @ rows, before, atol=1e-6)
        assert torch.equal(start.up, first[name].up)
    expected = {}
    for name, f in second.items():
        b1, b2 = first[name].up.double(), f.up.double()
        expected[name] = f.scale * (b1 + (b2 - b1) / math.sqrt(2)) @ f.down.double()
    assert_close(dense_delta(folders[1].read_carry().total), expected)


def test_slao_can_be_replayed_where_earlier_carries_were_removed(train: Train) -> None:

    kept = run_proof(train, "Slao", output_name="kept")
    run = train("lean", strategy="proof_strategies:Slao", keep_carries="last")
    assert not run.store.folders()[0].carry_file.is_file()
    rebuilt = run.store.carry_after(1)
    expected = dense_delta(kept[0].read_carry().total)
    got = dense_delta(rebuilt.total)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_a_frozen_a_stays_as_it_was_drawn(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Adapter] = []
    original = proof_strategies.FrozenA.begin_task

    def watched(self: Any, task: Any, carry: Any, spec: Any) -> Any:
        start = original(self, task, carry, spec)
        starts.append(start.adapter)
        return start

    monkeypatch.setattr(proof_strategies.FrozenA, "begin_task", watched)
    folders = run_proof(train, "FrozenA")
    for folder, start in zip(folders, starts, strict=True):
        for name, factors in folder.read_adapter().items():
            assert torch.equal(factors.down, start[name].down)
            assert factors.up.any()
