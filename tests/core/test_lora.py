"""The mathematics of one adapted matrix, against float64 formulas and torch.linalg."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lcp_plugin.errors import StrategyError
from lcp_plugin.lora import (
    compute_update,
    draw_down,
    orthogonal_columns,
    row_null_rows,
    select_by_magnitude,
    top_right_vectors,
    truncate_dense,
    truncate_factors,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last_right_vectors(columns: Tensor) -> Tensor:
    """The reference of arXiv 2410.04891: one SVD per column, its last right singular vector."""
    rows = [torch.linalg.svd(v.reshape(1, -1)).Vh[-1] for v in columns.T]
    return torch.stack(rows, dim=1)


# ---------------------------------------------------------------------------- orthogonal columns


@pytest.mark.parametrize("rank", [2, 3, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 6e-7), (torch.float64, 1e-15)], ids=["fp32", "fp64"]
)
def test_orthogonal_columns_equal_the_last_right_singular_vector_sign_included(
    rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    previous = torch.randn(rank, 60, dtype=dtype, generator=seeded(rank))
    got = orthogonal_columns(previous)
    assert got.dtype is dtype
    assert float((got - last_right_vectors(previous)).abs().max()) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 2e-15)], ids=["fp32", "fp64"]
)
def test_orthogonal_columns_are_unit_vectors_orthogonal_to_the_previous_ones(
    dtype: torch.dtype, tolerance: float
) -> None:
    previous = torch.randn(16, 500, dtype=dtype, generator=seeded(1))
    got = orthogonal_columns(previous)
    cosines = (got * previous).sum(dim=0) / previous.norm(dim=0)
    assert float(cosines.abs().max()) < tolerance
    assert float((got.norm(dim=0) - 1).abs().max()) < tolerance


@pytest.mark.parametrize(
    "column",
    [
        [0.0, 0.0, 0.0],
        [0.0, 1.0, 2.0],
        [0.0, 0.0, 3.0],
        [-2.0, 0.0, 0.0],
        [2.0, 0.0, 0.0],
        [0.0, 0.0, -1.0],
        [-1.0, 2.0, 0.0],
        [3.0, 0.0, 4.0],
        [-3.0, 0.0, 4.0],
    ],
)
def test_zeros_and_signs_are_treated_as_lapack_treats_them(column: list[float]) -> None:
    previous = torch.tensor(column, dtype=torch.float64).view(3, 1)
    expected = last_right_vectors(previous)
    assert torch.allclose(orthogonal_columns(previous), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("column", [[-0.0, 1.0, 2.0], [-0.0, 0.0, 3.0], [-0.0, 0.5, -0.25, 4.0]])
def test_a_negative_zero_counts_as_negative_as_in_fortrans_sign(column: list[float]) -> None:
    """Reference LAPACK: beta = -SIGN(norm, v_1), where -0.0 is negative (MKL takes it as +0)."""
    v = torch.tensor(column, dtype=torch.float64)
    beta = math.copysign(float(v.norm()), 1.0)  # -SIGN(n, -0.0) = +n
    u = v.clone()
    u[0] -= beta
    householder = torch.eye(len(v), dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u)
    got = orthogonal_columns(v.view(-1, 1))
    assert torch.allclose(got[:, 0], householder[-1], atol=1e-15, rtol=0)
    reference = last_right_vectors(v.view(-1, 1))
    assert torch.allclose(got.abs(), reference.abs(), atol=1e-15, rtol=0)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30, 1e37])
def test_tiny_and_huge_columns_neither_underflow_nor_overflow(size: float) -> None:
    shape = torch.randn(6, 20, dtype=torch.float64, generator=seeded(2))
    previous = (shape * size).float()
    expected = last_right_vectors(previous.double())  # in double nothing is tiny or huge
    assert float((orthogonal_columns(previous).double() - expected).abs().max()) < 5e-6


def test_one_zero_column_among_others_becomes_the_last_unit_vector() -> None:
    previous = torch.randn(4, 5, generator=seeded(3))
    previous[:, 2] = 0
    got = orthogonal_columns(previous)
    assert got[:, 2].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    previous = torch.randn(8, 30, generator=seeded(4)).to(dtype)
    got = orthogonal_columns(previous)
    assert got.dtype is torch.float32
    assert torch.equal(got, orthogonal_columns(previous.float()))


def test_orthogonal_columns_do_not_change_their_input() -> None:
    previous = torch.randn(4, 7, generator=seeded(5))
    before = previous.clone()
    orthogonal_columns(previous)
    assert torch.equal(previous, before)


def test_rank_one_has_no_orthogonal_column() -> None:
    with pytest.raises(StrategyError, match="network_dim >= 2"):
        orthogonal_columns(torch.ones(1, 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_columns_that_are_not_finite_are_an_error(bad: float) -> None:
    previous = torch.ones(2, 3)
    previous[1, 1] = bad
    with pytest.raises(StrategyError, match="NaN or infinity"):
        orthogonal_columns(previous)


# ------------------------------------------------------------------------------- starts of A


@pytest.mark.parametrize("rank", [4, 64])
def test_the_gaussian_start_has_the_standard_deviation_one_over_rank(rank: int) -> None:
    drawn = draw_down((rank, 1280), "gaussian", seeded(6)).double()
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / rank / math.sqrt(n)
    assert float(drawn.std()) == pytest.approx(1 / rank, rel=5 / math.sqrt(2 * n))


def test_the_unit_start_is_standard_normal() -> None:
    drawn = draw_down((16, 1280), "unit", seeded(7)).double()
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(n)
    assert float(drawn.std()) == pytest.approx(1, rel=5 / math.sqrt(2 * n))
    fourth = float((drawn**4).mean())
    assert fourth == pytest.approx(3, abs=5 * math.sqrt(96 / n))  # var of x^4: 105 - 9


def test_the_kaiming_start_is_uniform_as_networks_lora_has_it() -> None:
    drawn = draw_down((16, 640), "kaiming", seeded(8)).double()
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + 5)) / math.sqrt(640))  # kaiming_uniform(a=sqrt 5)
    n = drawn.numel()
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.abs().max()) > bound * (1 - 20 / n)
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n))


def test_the_same_generator_state_draws_the_same_start() -> None:
    assert torch.equal(
        draw_down((3, 5), "gaussian", seeded(9)), draw_down((3, 5), "gaussian", seeded(9))
    )


def test_an_unknown_init_names_the_known_ones() -> None:
    with pytest.raises(StrategyError, match="gaussian, unit, kaiming"):
        draw_down((2, 3), "normal", None)


# ------------------------------------------------------------------------------ update, selection


def test_an_update_is_scale_times_b_times_a() -> None:
    up, down = torch.randn(5, 2, generator=seeded(10)), torch.randn(2, 7, generator=seeded(11))
    expected = 0.25 * up.double() @ down.double()
    assert torch.allclose(compute_update(up, down, 0.25).double(), expected, atol=1e-6, rtol=0)
    double = compute_update(up.double(), down.double(), 0.25)
    assert torch.allclose(double, expected, atol=1e-15, rtol=0)


def test_an_update_of_half_precision_factors_is_computed_in_fp32() -> None:
    up, down = torch.randn(5, 2, generator=seeded(12)).half(), torch.randn(2, 7).half()
    got = compute_update(up, down, 3.0)
    assert got.dtype is torch.float32
    assert torch.allclose(got.double(), 3 * up.double() @ down.double(), atol=1e-5, rtol=0)


def test_selection_takes_the_larger_magnitude_and_ties_go_to_the_newest() -> None:
    newest = torch.tensor([[1.0, -2.0, 3.0, 0.0, -0.0, 1.0]])
    older = torch.tensor([[-1.0, 2.5, -2.0, 0.0, 0.0, -1.5]])
    got = select_by_magnitude(newest, older)
    assert got.tolist() == [[1.0, 2.5, 3.0, 0.0, 0.0, -1.5]]
    assert torch.signbit(got[0, 4])  # the tie of zeros too: the newest's negative zero


def test_selection_compares_in_fp32() -> None:
    newest, older = torch.tensor([0.1], dtype=torch.bfloat16), torch.tensor([0.1])
    expected = float(newest) if abs(float(newest)) >= float(older) else float(older)
    got = select_by_magnitude(newest, older)
    assert got.dtype is torch.float32
    assert float(got) == expected


# ------------------------------------------------------------------------------------ truncation


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (6, 6)])
@pytest.mark.parametrize("stacked", [3, 5, 20])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_reaches_the_dense_optimum(
    shape: tuple[int, int], stacked: int, rank: int
) -> None:
    up = torch.randn(shape[0], stacked, generator=seeded(13))
    down = torch.randn(stacked, shape[1], generator=seeded(14))
    dense = up.double() @ down.double()
    singular = torch.linalg.svdvals(dense)
    optimum = math.sqrt(float(singular[rank:].square().sum() / singular.square().sum()))
    new_up, new_down, error = truncate_factors(up, down, rank)
    keep = min(rank, stacked)
    assert new_up.shape == (shape[0], keep)
    assert new_down.shape == (keep, shape[1])
    reached = float((dense - new_up.double() @ new_down.double()).norm() / dense.norm())
    assert reached == pytest.approx(optimum, abs=2e-6)
    assert error == pytest.approx(optimum, abs=2e-6)


def test_truncation_keeps_the_singular_values_in_b_and_orthonormal_rows_in_a() -> None:
    up, down = torch.randn(8, 5, generator=seeded(15)), torch.randn(5, 11, generator=seeded(16))
    new_up, new_down, _ = truncate_factors(up, down, 3)
    singular = torch.linalg.svdvals(up.double() @ down.double())
    assert torch.allclose(new_down @ new_down.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(new_up.norm(dim=0).double(), singular[:3], rtol=1e-6, atol=0)


def test_truncation_in_double_precision_measures_tiny_errors() -> None:
    up = torch.randn(6, 4, dtype=torch.float64, generator=seeded(17))
    up[:, 3] = 1e-9 * up[:, 3]
    down = torch.randn(4, 7, dtype=torch.float64, generator=seeded(18))
    singular = torch.linalg.svdvals(up @ down)
    expected = float(singular[3] / singular.norm())
    assert truncate_factors(up, down, 3)[2] == pytest.approx(expected, rel=1e-5)


def test_truncating_nothing_loses_nothing() -> None:
    up, down, error = truncate_factors(torch.zeros(4, 2), torch.randn(2, 5), 1)
    assert error == 0
    assert not up.any()
    assert torch.isfinite(down).all()


@pytest.mark.parametrize("rank", [1, 3, 6, 10])
def test_a_dense_matrix_is_truncated_to_its_optimum(rank: int) -> None:
    matrix = torch.randn(6, 9, generator=seeded(19))
    singular = torch.linalg.svdvals(matrix.double())
    up, down, error = truncate_dense(matrix, rank)
    optimum = math.sqrt(float(singular[rank:].square().sum())) / float(singular.norm())
    assert up.shape[1] == down.shape[0] == min(rank, 6)
    reached = float((matrix.double() - up.double() @ down.double()).norm() / singular.norm())
    assert reached == pytest.approx(optimum, abs=2e-6)
    assert error == pytest.approx(optimum, abs=2e-6)


def test_top_right_vectors_are_the_svds_first_ones_up_to_sign() -> None:
    up, down = torch.randn(7, 4, generator=seeded(20)), torch.randn(4, 9, generator=seeded(21))
    expected = torch.linalg.svd(up.double() @ down.double()).Vh[:3]
    got = top_right_vectors(up, down, 3).double()
    assert torch.allclose((got * expected).sum(dim=1).abs(), torch.ones(3).double(), atol=1e-5)


def test_top_right_vectors_beyond_the_rank_are_zero_rows() -> None:
    got = top_right_vectors(torch.randn(7, 2), torch.randn(2, 9), 5)
    assert got.shape == (5, 9)
    assert not got[2:].any()
    assert torch.allclose(got[:2].norm(dim=1), torch.ones(2), atol=1e-6)


# -------------------------------------------------------------------------------- row null space


@pytest.mark.parametrize(("used", "rank"), [(1, 2), (4, 8), (6, 6), (0, 3)])
def test_null_rows_are_orthonormal_and_orthogonal_to_the_row_space(used: int, rank: int) -> None:
    space = torch.randn(used, 12, generator=seeded(22))
    rows, wide = row_null_rows(space, rank, seeded(23))
    assert wide
    assert rows.shape == (rank, 12)
    assert torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-6)
    if used:
        assert float((space @ rows.T).abs().max() / space.norm()) < 1e-6


def test_null_rows_count_the_true_rank_not_the_number_of_rows() -> None:
    basis = torch.randn(2, 6, generator=seeded(24))
    space = torch.randn(9, 2, generator=seeded(25)) @ basis  # nine rows, rank two
    rows, wide = row_null_rows(space, 4, seeded(26))
    assert wide
    assert float((basis @ rows.T).abs().max()) < 1e-5


def test_null_rows_fall_back_to_the_directions_of_least_energy() -> None:
    space = torch.randn(5, 6, generator=seeded(27))
    rows, wide = row_null_rows(space, 3, seeded(28))
    assert not wide
    _, values, vh = torch.linalg.svd(space.double(), full_matrices=True)
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    energy = float((space.double() @ rows.double().T).square().sum())
    assert energy == pytest.approx(float(values[-2:].square().sum()), rel=1e-5)
    overlap = (rows.double() @ vh[-3:].T).square().sum()  # the same subspace: 3 = rank
    assert float(overlap) == pytest.approx(3, abs=1e-5)


def test_null_rows_of_more_rows_than_inputs_are_an_error() -> None:
    with pytest.raises(StrategyError, match="rank 5 exceeds the 4 inputs"):
        row_null_rows(torch.randn(2, 4), 5, None)
