"""The built-in strategies on 3 x 4 matrices, against float64 formulas written from the papers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import pytest
import torch
from strategy_variants import FOUR, VARIANTS, columns_overlap, make
from torch import Tensor
from toy_values import (
    SHAPES,
    add,
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
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Carry
from lcp_plugin.strategies import BUILT_IN


def norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


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
    assert (
        "no null space of the rank is left for 2 modules" in warnings[0].getMessage()
    )  # 3 x 4 and 4 x 3
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
