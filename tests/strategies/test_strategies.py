"""The built-in strategies on 3 x 4 matrices, against float64 formulas written from the papers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
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

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.strategies import BUILT_IN

FOUR = ("naive", "merge_init", "merge_ortho_init", "magmax")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in BUILT_IN},
    "ortho factor_sum": ("merge_ortho_init", {"merge": "factor_sum"}),
    "ortho row_null": ("merge_ortho_init", {"mode": "row_null", "scale": "match_gaussian"}),
    "magmax original": ("magmax", {"reference": "original"}),
    "magmax scaled": ("magmax", {"scale": 0.7}),
    "naive kaiming": ("naive", {"init": "kaiming"}),
}


def make(variant: str) -> Strategy:
    name, options = VARIANTS[variant]
    return BUILT_IN[name](**options)


def columns_overlap(a: Tensor, b: Tensor) -> float:
    """The largest |cosine| between equal-numbered columns."""
    return float(((a * b).sum(dim=0) / (a.norm(dim=0) * b.norm(dim=0))).abs().max())


def norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


# --------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", FOUR)
def test_the_first_task_starts_and_ends_alike_under_all_four(name: str) -> None:
    strategy, reference = BUILT_IN[name](), BUILT_IN["merge_init"]()
    start = strategy.begin_task(make_task(), Carry(), make_spec())
    expected = reference.begin_task(make_task(), Carry(), make_spec())
    assert len(start.base) == 0
    assert start.trainable == {"A", "B"}
    for module, factors in expected.adapter.items():
        assert torch.equal(start.adapter[module].down, factors.down)
        assert not start.adapter[module].up.any()
    (carry, (update,)), (other, _) = learn(strategy, 1), learn(reference, 1)
    for module in SHAPES:
        assert torch.equal(carry.total[module].dense(), other.total[module].dense())
    assert_close(dense_delta(carry.total), dense_updates(update))


def test_naive_goes_on_with_the_same_factors() -> None:
    strategy = BUILT_IN["naive"]()
    carry, updates = learn(strategy, 3)
    assert carry.adapter is updates[-1]
    assert len(carry.delta) == 0
    assert_close(dense_delta(carry.total), dense_updates(updates[-1]))
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    for module in SHAPES:
        assert start.adapter[module] is updates[-1][module]


def test_naive_keeps_the_alpha_and_rank_of_the_factors_that_go_on() -> None:
    carry, _ = learn(BUILT_IN["naive"](), 1)
    start = BUILT_IN["naive"]().begin_task(make_task(2), carry, make_spec(2, rank=3, alpha=9.0))
    assert {f.rank for f in start.adapter.values()} == {2}
    assert {f.alpha for f in start.adapter.values()} == {3.0}


def test_merge_init_sums_the_updates_and_starts_afresh() -> None:
    strategy = BUILT_IN["merge_init"]()
    carry, updates = learn(strategy, 3)
    expected: dict[str, Tensor] = {}
    for update in updates:
        expected = add(expected, dense_updates(update))
    assert_close(dense_delta(carry.total), expected)
    assert carry.adapter is None
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    assert_close(dense_delta(start.base), expected)
    fresh = make_spec(4).gaussian()
    assert all(torch.equal(start.adapter[m].down, fresh[m].down) for m in SHAPES)
    assert not any(start.adapter[m].up.any() for m in SHAPES)


def test_merge_ortho_init_starts_orthogonal_to_the_sum_of_earlier_as() -> None:
    strategy = BUILT_IN["merge_ortho_init"]()
    carry, updates = learn(strategy, 3)
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    expected: dict[str, Tensor] = {}
    for update in updates:
        expected = add(expected, dense_updates(update))
    assert_close(dense_delta(carry.total), expected)
    for module, shape in SHAPES.items():
        accumulated = sum(u[module].down.double() for u in updates)
        assert isinstance(accumulated, Tensor)
        down = start.adapter[module].down
        assert columns_overlap(down.double(), accumulated) < 1e-6
        assert norm(down) == pytest.approx(math.sqrt(shape[1]), rel=1e-6)
        svd = torch.stack([torch.linalg.svd(c.view(1, -1)).Vh[-1] for c in accumulated.T], dim=1)
        assert torch.allclose(down.double(), svd, atol=1e-5)


def test_match_gaussian_gives_the_start_the_gaussians_expected_norm() -> None:
    for options in ({}, {"mode": "row_null"}):
        strategy = BUILT_IN["merge_ortho_init"](scale="match_gaussian", **options)
        carry, _ = learn(strategy, 1)
        start = strategy.begin_task(make_task(2), carry, make_spec(2))
        for module, shape in SHAPES.items():
            expected = math.sqrt(2 * shape[1] * (1 / 2) ** 2)  # rank x in entries of std 1 / rank
            assert norm(start.adapter[module].down) == pytest.approx(expected, rel=1e-6)


def test_factor_sum_is_the_authors_product_of_sums_with_its_cross_terms() -> None:
    strategy = BUILT_IN["merge_ortho_init"](merge="factor_sum")
    carry, updates = learn(strategy, 3)
    for module in SHAPES:
        ups = torch.stack([u[module].up.double() for u in updates]).sum(dim=0)
        downs = torch.stack([u[module].down.double() for u in updates]).sum(dim=0)
        expected = 3.0 / 2 * ups @ downs
        exact = torch.stack([dense_updates(u)[module] for u in updates]).sum(dim=0)
        assert_close({module: dense_delta(carry.total)[module]}, {module: expected})
        assert norm(expected - exact) > 0.1 * norm(exact)
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    assert_close(dense_delta(start.base), dense_delta(carry.total))


def test_factor_sum_refuses_a_foreign_parent_before_training() -> None:
    carry, _ = learn(BUILT_IN["merge_init"](), 1)
    strategy = BUILT_IN["merge_ortho_init"](merge="factor_sum")
    with pytest.raises(StrategyError, match="only its own chains"):
        strategy.begin_task(make_task(2), carry, make_spec(2))
    with pytest.raises(StrategyError, match="only its own chains"):
        strategy.end_task(make_task(2), carry, random_adapter(2))


def test_factor_sum_refuses_another_rank_instead_of_forgetting_silently() -> None:
    strategy = BUILT_IN["merge_ortho_init"](merge="factor_sum")
    carry, _ = learn(strategy, 1)
    with pytest.raises(StrategyError, match="at one network_dim"):
        strategy.begin_task(make_task(2), carry, make_spec(2, rank=3))


def test_factor_sum_keeps_modules_that_are_not_trained_any_more() -> None:
    strategy = BUILT_IN["merge_ortho_init"](merge="factor_sum")
    carry, (update,) = learn(strategy, 1)
    fewer = {"unet.a": SHAPES["unet.a"]}
    start = strategy.begin_task(make_task(2), carry, make_spec(2, shapes=fewer))
    after = strategy.end_task(make_task(2), carry, pretend_training(start.adapter, 2))
    expected = dense_updates(update)
    got = dense_delta(after.total)
    for module in ("unet.b", "unet.wide"):
        assert_close({module: got[module]}, {module: expected[module]})


def test_row_null_starts_outside_the_row_space_of_what_was_learned() -> None:
    strategy = BUILT_IN["merge_ortho_init"](mode="row_null")
    carry, _ = learn(strategy, 3)
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    down, learned = start.adapter["unet.wide"].down.double(), dense_delta(carry.total)["unet.wide"]
    assert float((learned @ down.T).abs().max()) < 1e-5
    assert torch.allclose(down @ down.T, torch.eye(2, dtype=torch.float64), atol=1e-6)


def test_row_null_of_a_dense_delta_of_low_rank_still_finds_the_null_space() -> None:
    dense = (torch.randn(30, 3) @ torch.randn(3, 20)).contiguous()
    carry = Carry(delta=Delta({"unet.x": Dense(dense)}))
    strategy = BUILT_IN["merge_ortho_init"](mode="row_null")
    start = strategy.begin_task(make_task(2), carry, make_spec(2, shapes={"unet.x": (30, 20)}))
    overlap = dense.double() @ start.adapter["unet.x"].down.double().T
    assert float(overlap.abs().max()) < 1e-5 * norm(dense)


def test_row_null_without_room_takes_the_least_energy_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = BUILT_IN["merge_ortho_init"](mode="row_null")
    with caplog.at_level(logging.WARNING):
        carry, _ = learn(strategy, 2)
        caplog.clear()
        start = strategy.begin_task(make_task(3), carry, make_spec(3))
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "2 modules have no null space" in warnings[0].getMessage()  # 3 x 4 and 4 x 3
    matrix = dense_delta(carry.total)["unet.a"]
    values = torch.linalg.svd(matrix).S  # (3,), of a 3 x 4 matrix
    down = start.adapter["unet.a"].down.double()
    energy = float((matrix @ down.T).square().sum())
    assert energy == pytest.approx(float(values[-1] ** 2), rel=1e-4)


def test_magmax_keeps_the_larger_entry_of_running_delta_and_update() -> None:
    strategy = BUILT_IN["magmax"]()
    carry, updates = learn(strategy, 3)
    expected = dense_updates(updates[0])
    for update in updates[1:]:
        new = dense_updates(update)
        expected = {
            m: torch.where(new[m].abs() >= expected[m].abs(), new[m], expected[m]) for m in new
        }
    assert_close(dense_delta(carry.total), expected)
    assert not strategy.state_dict()
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    assert_close(dense_delta(start.base), expected)


def test_magmax_gives_ties_to_the_newest() -> None:
    older = Carry(delta=Delta({"unet.x": Dense(torch.tensor([[2.0, -2.0], [1.0, 0.0]]))}))
    newest = Adapter({"unet.x": Factors(torch.eye(2), -older.delta["unet.x"].dense(), 2.0)})
    after = BUILT_IN["magmax"]().end_task(make_task(2), older, newest)
    assert after.total["unet.x"].dense().tolist() == [[-2.0, 2.0], [-1.0, 0.0]]


def test_magmax_original_trains_on_unselected_weights_and_scales_by_a_half() -> None:
    """tau_t = theta_t - theta_0, theta_t trained from theta_{t-1}; D = 0.5 max_t tau_t."""
    strategy = BUILT_IN["magmax"](reference="original")
    assert not strategy.starts_from_parent
    carry, updates = learn(strategy, 3)
    tau: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for update in updates:
        tau = add(tau, dense_updates(update))
        largest = {
            m: tau[m]
            if m not in largest
            else torch.where(tau[m].abs() >= largest[m].abs(), tau[m], largest[m])
            for m in tau
        }
    assert_close(dense_delta(carry.total), {m: 0.5 * d for m, d in largest.items()})
    start = strategy.begin_task(make_task(4), carry, make_spec(4))
    assert_close(dense_delta(start.base), tau)


def test_magmax_with_a_scale_selects_among_unscaled_updates() -> None:
    strategy = BUILT_IN["magmax"](scale=0.7)
    carry, updates = learn(strategy, 3)
    largest = dense_updates(updates[0])
    for update in updates[1:]:
        new = dense_updates(update)
        largest = {
            m: torch.where(new[m].abs() >= largest[m].abs(), new[m], largest[m]) for m in new
        }
    assert_close(dense_delta(carry.total), {m: 0.7 * d for m, d in largest.items()})


@pytest.mark.parametrize("name", [*FOUR, "independent", "merge_at_end", "joint"])
@pytest.mark.parametrize("init", ["gaussian", "unit", "kaiming"])
def test_every_strategy_draws_its_first_start_as_init_says(name: str, init: str) -> None:
    start = BUILT_IN[name](init=init).begin_task(make_task(), Carry(), make_spec())
    expected = make_spec().fresh(init)
    assert all(torch.equal(start.adapter[m].down, expected[m].down) for m in SHAPES)


def test_independent_carries_only_the_last_update() -> None:
    strategy = BUILT_IN["independent"]()
    carry, updates = learn(strategy, 3)
    assert_close(dense_delta(carry.total), dense_updates(updates[-1]))
    assert len(strategy.begin_task(make_task(4), carry, make_spec(4)).base) == 0


def test_merge_at_end_sums_updates_that_were_all_trained_on_the_base() -> None:
    strategy = BUILT_IN["merge_at_end"]()
    carry, updates = learn(strategy, 3)
    expected: dict[str, Tensor] = {}
    for update in updates:
        expected = add(expected, dense_updates(update))
    assert_close(dense_delta(carry.total), expected)
    assert len(strategy.begin_task(make_task(4), carry, make_spec(4)).base) == 0


def test_only_the_bounds_and_magmax_original_leave_the_parent() -> None:
    leaving = {v for v in VARIANTS if not make(v).starts_from_parent}
    assert leaving == {"independent", "merge_at_end", "magmax original"}
    assert [n for n in BUILT_IN if BUILT_IN[n].joins_tasks] == ["joint"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("merge_ortho_init", {"merge": "sum"}, "merge = 'sum'; use exact or factor_sum"),
        ("merge_ortho_init", {"mode": "row"}, "mode = 'row'; use column or row_null"),
        ("merge_ortho_init", {"scale": "one"}, "scale = 'one'; use unit or match_gaussian"),
        ("magmax", {"reference": "paper"}, "use running or original"),
        ("naive", {"init": "zeros"}, "gaussian, unit, kaiming"),
    ],
)
def test_unknown_options_name_the_known_ones(
    name: str, options: Mapping[str, str], message: str
) -> None:
    with pytest.raises(StrategyError, match=message):
        BUILT_IN[name](**options)


def test_ortho_of_rank_one_is_an_error_even_for_the_first_task() -> None:
    with pytest.raises(StrategyError, match="network_dim >= 2"):
        BUILT_IN["merge_ortho_init"]().begin_task(make_task(), Carry(), make_spec(rank=1))


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
