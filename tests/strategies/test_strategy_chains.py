"""Strategies leave their inputs alone, go on from their state, and chain on one another."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load, save
from strategy_variants import FOUR, VARIANTS, columns_overlap, make
from torch import Tensor
from toy_values import (
    SHAPES,
    add,
    all_tensors,
    assert_close,
    dense_delta,
    dense_updates,
    learn,
    make_spec,
    make_task,
    pretend_training,
    random_adapter,
)

from lcp_plugin.adapter import Adapter
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.strategies import BUILT_IN

# ------------------------------------------------------------------------------ purity and state


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_strategy_changes_its_inputs(variant: str) -> None:
    strategy, carry = make(variant), Carry()
    for index in (1, 2, 3):
        task, spec = make_task(index), make_spec(index)
        before = [t.clone() for t in all_tensors(carry)]
        names, shapes = carry.tasks, dict(spec.shapes)
        start = strategy.begin_task(task, carry, spec)
        trained = pretend_training(start.adapter, index)
        started = [t.clone() for t in all_tensors(start.adapter)]
        updated = [t.clone() for t in all_tensors(trained)]
        after = strategy.end_task(task, carry, trained)
        for now, then in (
            (all_tensors(carry), before),
            (all_tensors(start.adapter), started),
            (all_tensors(trained), updated),
        ):
            assert len(now) == len(then)
            assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
        assert carry.tasks == names
        assert dict(spec.shapes) == shapes
        carry = after


@pytest.mark.parametrize("variant", VARIANTS)
def test_end_task_leaves_earlier_state_tensors_alone(variant: str) -> None:
    strategy = make(variant)
    carry, _ = learn(strategy, 2)
    state = strategy.state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    learn(strategy, 1, carry, first=3)
    assert all(torch.equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_begin_task_may_be_repeated(variant: str) -> None:
    strategy = make(variant)
    carry, _ = learn(strategy, 2)
    one = strategy.begin_task(make_task(3), carry, make_spec(3))
    two = strategy.begin_task(make_task(3), carry, make_spec(3))
    for a, b in ((one.base, two.base), (one.adapter, two.adapter)):
        tensors = zip(all_tensors(a), all_tensors(b), strict=True)
        assert all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_strategy_restored_from_its_state_goes_on_bit_for_bit(variant: str) -> None:
    whole = make(variant)
    carry, _ = learn(whole, 2)
    resumed = make(variant)
    resumed.load_state_dict(load(save(whole.state_dict())) if whole.state_dict() else {})
    expected, _ = learn(whole, 2, carry, first=3)
    got, _ = learn(resumed, 2, carry, first=3)
    pairs = zip(all_tensors(got), all_tensors(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert got.tasks == expected.tasks


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_carry_records_every_task_once(variant: str) -> None:
    carry, _ = learn(make(variant), 3)
    assert [(r.index, r.name) for r in carry.tasks] == [(i, f"task{i}") for i in (1, 2, 3)]


# ------------------------------------------------------------------------- changing the strategy


def check_start(strategy: Strategy, carry: Carry, rank: int = 2) -> None:
    """Law 3 in weight space: base + adapter = the parent's total."""
    start = strategy.begin_task(make_task(3), carry, make_spec(3, rank=rank))
    if strategy.starts_from_parent:
        effective = add(dense_delta(start.base), dense_updates(start.adapter))
        parent = dense_delta(carry.total)
        assert_close({m: effective[m] for m in parent}, parent)
        assert not any(effective[m].any() for m in effective.keys() - parent.keys())


@pytest.mark.parametrize("child", FOUR)
@pytest.mark.parametrize("parent", FOUR)
def test_all_pairs_of_strategies_chain(parent: str, child: str) -> None:
    carry, _ = learn(BUILT_IN[parent](), 2)
    strategy = BUILT_IN[child]()
    check_start(strategy, carry)
    check_start(strategy, carry, rank=3)
    after, (update,) = learn(strategy, 1, carry, first=3)
    after.total.check_finite()
    assert len(after.tasks) == 3
    parent_delta, new = dense_delta(carry.total), dense_updates(update)
    if child == "magmax":
        expected = {
            m: torch.where(new[m].abs() >= parent_delta[m].abs(), new[m], parent_delta[m])
            for m in new
        }
    elif child == "naive" and carry.adapter is not None:
        expected = add(dense_delta(carry.delta), new)
    else:
        expected = add(parent_delta, new)
    assert_close(dense_delta(after.total), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_outside_the_targets_stay_in_the_carry_untouched(variant: str) -> None:
    outside = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    factors = Adapter({outside: random_adapter(9)["unet.wide"]})
    for carry in (Carry(delta=Delta.of(factors)), Carry(adapter=factors)):
        strategy = make(variant)
        if not strategy.starts_from_parent and variant == "independent":
            continue  # nothing is carried, by its definition
        after, _ = learn(strategy, 2, carry)
        expected = dense_updates(factors)[outside]
        got = dense_delta(after.total)[outside]
        assert_close({outside: got}, {outside: expected})


def test_naive_leaves_factors_of_modules_it_does_not_train_in_the_delta() -> None:
    carry, (update,) = learn(BUILT_IN["naive"](), 1)
    fewer = {"unet.a": SHAPES["unet.a"]}
    strategy = BUILT_IN["naive"]()
    start = strategy.begin_task(make_task(2), carry, make_spec(2, shapes=fewer))
    assert set(start.adapter) == {"unet.a"}
    assert set(start.base) == {"unet.b", "unet.wide"}
    after = strategy.end_task(make_task(2), carry, pretend_training(start.adapter, 2))
    expected = dense_updates(update)
    assert_close(dense_delta(after.delta), {m: expected[m] for m in ("unet.b", "unet.wide")})


def test_ortho_without_state_sums_the_equal_rank_blocks() -> None:
    carry, updates = learn(BUILT_IN["merge_init"](), 3)
    start = BUILT_IN["merge_ortho_init"]().begin_task(make_task(4), carry, make_spec(4))
    accumulated = sum(u["unet.wide"].down.double() for u in updates)
    assert isinstance(accumulated, Tensor)
    assert columns_overlap(start.adapter["unet.wide"].down.double(), accumulated) < 1e-6


@pytest.mark.parametrize("form", ["stacked", "dense"])
def test_ortho_without_equal_blocks_takes_the_top_right_singular_vectors(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    carry, _ = learn(BUILT_IN["merge_init"](), 1, rank=4)
    entry = carry.total["unet.wide"]
    assert isinstance(entry, Stacked)
    given = entry if form == "stacked" else Dense(entry.dense())
    carry = Carry(delta=Delta({"unet.wide": given}))
    with caplog.at_level(logging.INFO):
        start = BUILT_IN["merge_ortho_init"]().begin_task(make_task(2), carry, make_spec(2))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1
    assert "top right singular vectors" in lines[0]
    matrix = entry.up.double() @ entry.down.double()
    vectors = torch.linalg.svd(matrix).Vh[:2]  # (2, in)
    down = start.adapter["unet.wide"].down.double()
    products = down * vectors  # signs of singular vectors are free: a_1 v_1 = +- a_2 v_2
    assert torch.allclose(products[0].abs(), products[1].abs(), atol=1e-5)


def test_ortho_goes_on_from_a_parent_without_state_as_if_it_had_been_its_own() -> None:
    carry, updates = learn(BUILT_IN["merge_init"](), 2)
    strategy = BUILT_IN["merge_ortho_init"]()
    _, later = learn(strategy, 1, carry, first=3)
    state = strategy.state_dict()
    expected = sum(u["unet.wide"].down.double() for u in (*updates, *later))
    assert torch.allclose(state["sum_down/unet.wide"].double(), expected, atol=1e-5)


@pytest.mark.parametrize("child", FOUR)
def test_a_parent_without_the_childs_modules_is_a_first_task_for_them(child: str) -> None:
    carry = Carry(delta=Delta.of(random_adapter(3).restrict(["unet.a"])))
    start = BUILT_IN[child]().begin_task(make_task(2), carry, make_spec(2))
    fresh = make_spec(2).gaussian()
    assert torch.equal(start.adapter["unet.b"].down, fresh["unet.b"].down)


def test_facts_can_be_noted_on_the_newest_record_only() -> None:
    carry, _ = learn(BUILT_IN["merge_init"](), 2)
    noted = carry.noting(steps=5)
    assert noted.tasks[-1].facts == {"steps": 5}
    assert noted.tasks[0] == carry.tasks[0]
    assert carry.tasks[-1].facts == {}
