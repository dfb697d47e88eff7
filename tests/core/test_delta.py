"""Deltas: exact sums of updates, stacked while that is smaller, against float64 formulas."""

from __future__ import annotations

import json
import math

import pytest
import torch
from toy_values import (
    SHAPES,
    add,
    assert_close,
    dense_delta,
    dense_updates,
    random_adapter,
    random_factors,
    seeded,
)

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delta import (
    Delta,
    Dense,
    Stacked,
    adapter_from_tensors,
    adapter_to_tensors,
    delta_from_tensors,
    delta_to_tensors,
)
from lcp_plugin.errors import FileFormatError, NumericError


def delta_of(seed: int, rank: int = 2, alpha: float = 3.0) -> Delta:
    return Delta.of(random_adapter(seed, rank, alpha))


def dense_only(seed: int) -> Delta:
    """All modules dense."""
    return Delta({n: Dense(e.dense()) for n, e in delta_of(seed).items()})


# ------------------------------------------------------------------------------- stacking, adding


def test_a_delta_is_the_adapters_update() -> None:
    adapter = random_adapter(1, rank=2, alpha=5.0)
    assert_close(dense_delta(Delta.of(adapter)), dense_updates(adapter))


def test_the_delta_of_nothing_is_empty() -> None:
    assert len(Delta.of(None)) == 0
    assert Delta().norm() == 0
    assert Delta().nbytes() == 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (64, 64)])
def test_stacks_turn_dense_exactly_where_stacking_stops_being_smaller(
    shape: tuple[int, int],
) -> None:
    total, rank = Delta(), 0
    while rank < min(shape):
        total = total + Delta.of(Adapter({"unet.x": random_factors(shape, 1, 1.0, rank)}))
        rank += 1
        entry = total["unet.x"]
        smaller = rank * shape[0] + rank * shape[1] < shape[0] * shape[1]
        assert isinstance(entry, Stacked if smaller else Dense), rank
        stored = rank * sum(shape) if smaller else shape[0] * shape[1]
        assert total.nbytes() == 4 * stored


def test_a_single_update_that_is_bigger_than_the_matrix_is_dense_at_once() -> None:
    assert isinstance(delta_of(1)["unet.a"], Dense)  # 2 x (3 + 4) > 12
    assert isinstance(delta_of(1)["unet.wide"], Stacked)


def test_ranks_of_stacked_deltas_add_up_and_blocks_keep_their_order() -> None:
    total = delta_of(1, rank=2) + delta_of(2, rank=3) + delta_of(3, rank=1)
    entry = total["unet.wide"]
    assert isinstance(entry, Stacked)
    assert entry.blocks == (2, 3, 1)
    assert entry.rank == 6
    oldest = random_adapter(1, rank=2)["unet.wide"]
    assert torch.equal(entry.down[:2], oldest.down)


@pytest.mark.parametrize("tasks", [2, 3, 12])
def test_sums_are_exact_whatever_form_they_take(tasks: int) -> None:
    adapters = [random_adapter(i, rank=1 + i % 3, alpha=0.5 + i) for i in range(tasks)]
    total, expected = Delta(), {}
    for adapter in adapters:
        total, expected = total + Delta.of(adapter), add(expected, dense_updates(adapter))
    got = dense_delta(total)
    for name in expected:
        size = float(expected[name].norm())
        assert float((got[name] - expected[name]).norm()) < 1e-6 * size


def test_dense_and_stacked_parts_add_in_either_order() -> None:
    a, b = delta_of(1), dense_only(2)
    expected = add(dense_delta(a), dense_delta(b))
    assert_close(dense_delta(a + b), expected)
    assert_close(dense_delta(b + a), expected)
    assert isinstance((a + b)["unet.wide"], Dense)


def test_modules_in_one_delta_only_stay_in_the_sum_untouched() -> None:
    a, b = delta_of(1).restrict(["unet.a", "unet.wide"]), delta_of(2).restrict(["unet.b"])
    total = a + b
    assert set(total) == set(SHAPES)
    assert total["unet.wide"] is a["unet.wide"]
    assert total["unet.b"] is b["unet.b"]


def test_deltas_of_different_bases_do_not_add() -> None:
    a = Delta({"unet.x": Dense(torch.zeros(3, 4))})
    b = Delta({"unet.x": Dense(torch.zeros(4, 3))})
    with pytest.raises(FileFormatError, match="different bases"):
        a + b
    with pytest.raises(FileFormatError, match="different bases"):
        a.select_by_magnitude(b)


def test_factors_of_different_alpha_and_rank_add_as_matrices_never_as_factors() -> None:
    one = Adapter({"unet.x": random_factors((30, 30), rank=2, alpha=8.0, seed=1)})
    two = Adapter({"unet.x": random_factors((30, 30), rank=3, alpha=0.1, seed=2)})
    expected = add(dense_updates(one), dense_updates(two))
    assert_close(dense_delta(Delta.of(one) + Delta.of(two)), expected)


def test_the_scale_of_an_update_goes_into_b_only() -> None:
    factors = random_factors((40, 50), rank=2, alpha=5.0)
    entry = Delta.of(Adapter({"unet.x": factors}))["unet.x"]
    assert isinstance(entry, Stacked)
    assert torch.equal(entry.down, factors.down)
    assert torch.equal(entry.up, factors.up * 2.5)


def test_the_weight_of_a_merge_goes_into_b_only() -> None:
    delta = delta_of(1)
    halved = delta.weighted(0.5)
    entry, before = halved["unet.wide"], delta["unet.wide"]
    assert isinstance(entry, Stacked)
    assert isinstance(before, Stacked)
    assert torch.equal(entry.down, before.down)
    assert torch.equal(entry.up, 0.5 * before.up)
    assert entry.blocks == before.blocks
    assert_close(dense_delta(halved), {n: 0.5 * d for n, d in dense_delta(delta).items()})


def test_weights_zero_and_one() -> None:
    delta = delta_of(1)
    assert delta.weighted(1) is delta
    assert len(delta.weighted(0)) == 0
    assert_close(
        dense_delta(delta.weighted(-2)), {n: -2 * d for n, d in dense_delta(delta).items()}
    )


def test_adding_changes_neither_part() -> None:
    a, b = delta_of(1), delta_of(2)
    before = {n: t.clone() for n, t in {**dense_delta(a)}.items()}
    a + b
    assert a["unet.wide"].blocks == (2,)  # type: ignore[union-attr]
    assert all(torch.equal(t, before[n]) for n, t in dense_delta(a).items())


def test_a_delta_is_read_only_and_sorted() -> None:
    delta = Delta({"unet.b": Dense(torch.zeros(2, 2)), "unet.a": Dense(torch.zeros(2, 2))})
    assert list(delta) == ["unet.a", "unet.b"]
    with pytest.raises(TypeError):
        delta["unet.c"] = Dense(torch.zeros(2, 2))  # type: ignore[index]


def test_blocks_that_do_not_sum_to_the_rank_are_an_error() -> None:
    with pytest.raises(FileFormatError, match="does not fit together"):
        Stacked(torch.zeros(4, 3), torch.zeros(3, 5), (2,))
    with pytest.raises(FileFormatError, match="does not fit together"):
        Stacked(torch.zeros(4, 2), torch.zeros(3, 5), (3,))


# --------------------------------------------------------------------------------- convolutions


def test_a_flattened_convolution_does_what_two_convolutions_do() -> None:
    down, up = torch.randn(2, 4, 3, 3, generator=seeded(1)), torch.randn(6, 2, 1, 1)
    factors = Factors(down.reshape(2, 36), up.reshape(6, 2), 4.0, (3, 3))
    entry = Delta.of(Adapter({"unet.conv": factors}))["unet.conv"]
    assert entry.kernel == (3, 3)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=seeded(2))
    conv = torch.nn.functional.conv2d
    expected = 2 * conv(conv(x, down.double(), padding=1), up.double())
    weight = dense_delta(Delta({"c": entry}))["c"].view(6, 4, 3, 3)
    assert torch.allclose(conv(x, weight, padding=1), expected, atol=1e-5)


def test_the_kernel_survives_sums_selection_truncation_and_weights() -> None:
    def conv(seed: int) -> Delta:
        f = random_factors((20, 36), 2, 2.0, seed)
        return Delta.of(Adapter({"unet.conv": Factors(f.down, f.up, 2.0, (3, 3))}))

    a, b = conv(1), conv(2)
    for delta in (a + b, a.select_by_magnitude(b), (a + b).truncate(1)[0], a.weighted(2.0)):
        assert delta["unet.conv"].kernel == (3, 3)
    assert (a + b).as_adapter()["unet.conv"].kernel == (3, 3)


# ------------------------------------------------------------------------------------ selection


def test_selection_takes_the_larger_entry_of_each_pair_and_ties_go_to_the_newest() -> None:
    a, b = delta_of(1), delta_of(2)
    new, old = dense_delta(a), dense_delta(b)
    expected = {n: torch.where(new[n].abs() >= old[n].abs(), new[n], old[n]) for n in new}
    assert_close(dense_delta(a.select_by_magnitude(b)), expected)
    tie = Delta({"unet.x": Dense(torch.tensor([[1.0, -1.0]]))})
    other = Delta({"unet.x": Dense(torch.tensor([[-1.0, 1.0]]))})
    assert tie.select_by_magnitude(other)["unet.x"].dense().tolist() == [[1.0, -1.0]]


def test_selection_keeps_modules_that_only_one_side_changes_in_their_form() -> None:
    newest, older = delta_of(1).restrict(["unet.wide"]), delta_of(2).restrict(["unet.b"])
    got = newest.select_by_magnitude(older)
    assert got["unet.wide"] is newest["unet.wide"]
    assert got["unet.b"] is older["unet.b"]


def test_selection_against_nothing_is_the_update_itself() -> None:
    delta = delta_of(1)
    assert dict(delta.select_by_magnitude(Delta())) == dict(delta)
    assert dict(Delta().select_by_magnitude(delta)) == dict(delta)


# -------------------------------------------------------------------------------- norms, NaN, size


def test_norms_equal_those_of_the_dense_matrices() -> None:
    total = delta_of(1) + delta_of(2)
    dense = dense_delta(total)
    for name, entry in total.items():
        assert entry.norm() == pytest.approx(float(dense[name].norm()), rel=1e-9)
    expected = math.sqrt(sum(float(d.square().sum()) for d in dense.values()))
    assert total.norm() == pytest.approx(expected, rel=1e-9)


def test_the_norm_of_updates_that_cancel_is_zero_not_nan() -> None:
    f = random_factors((40, 50), 2, 2.0)
    opposite = Factors(f.down, -f.up, 2.0)
    total = Delta.of(Adapter({"u": f})) + Delta.of(Adapter({"u": opposite}))
    size = Delta.of(Adapter({"u": f})).norm()
    assert total.norm() == pytest.approx(0, abs=1e-6 * size)


@pytest.mark.parametrize("entry", ["stacked", "dense"])
def test_check_finite_names_the_module_of_a_delta(entry: str) -> None:
    bad = torch.full((4, 2), math.inf)
    made = Stacked(bad, torch.ones(2, 5), (2,)) if entry == "stacked" else Dense(bad)
    with pytest.raises(NumericError, match=r"unet\.x"):
        Delta({"unet.x": made}).check_finite()
    delta_of(1).check_finite()


# ------------------------------------------------------------------------------------ truncation


def test_truncation_reports_each_modules_optimal_error() -> None:
    total = delta_of(1) + delta_of(2) + delta_of(3)
    dense = dense_delta(total)
    truncated, errors = total.truncate(2)
    for name, matrix in dense.items():
        values = torch.linalg.svdvals(matrix)
        optimum = float(values[2:].norm() / values.norm())
        left = dense_delta(truncated)[name]
        assert float((left - matrix).norm() / matrix.norm()) == pytest.approx(optimum, abs=3e-6)
        assert errors[name] == pytest.approx(optimum, abs=3e-6)
        assert torch.linalg.matrix_rank(left, rtol=1e-5) <= 2


def test_the_overall_error_weighs_modules_by_their_norm() -> None:
    total = delta_of(1) + delta_of(2)
    truncated, errors = total.truncate(1)
    dense, left = dense_delta(total), dense_delta(truncated)
    lost = sum(float((dense[n] - left[n]).square().sum()) for n in dense)
    size = sum(float(d.square().sum()) for d in dense.values())
    assert total.overall_error(errors) == pytest.approx(math.sqrt(lost / size), rel=1e-5)
    assert Delta().overall_error({}) == 0


def test_entries_of_a_lower_rank_are_left_as_they_are() -> None:
    delta = delta_of(1, rank=2)
    truncated, errors = delta.truncate(8)
    assert truncated["unet.wide"] is delta["unet.wide"]
    assert set(errors.values()) == {0.0}
    assert truncated["unet.a"] is delta["unet.a"]  # dense, but of at most rank 3


# -------------------------------------------------------------------------- as LoRAs and in files


def test_every_entry_is_written_as_an_exact_lora_with_alpha_equal_to_its_rank() -> None:
    total = delta_of(1) + delta_of(2) + Delta({"unet.tall": Dense(torch.randn(9, 4))})
    adapter = total.as_adapter()
    assert_close(dense_updates(adapter), dense_delta(total))
    for factors in adapter.values():
        assert factors.alpha == factors.rank
        assert factors.rank <= min(factors.shape)


def test_a_dense_entry_as_a_lora_is_bit_exact() -> None:
    for shape in ((4, 9), (9, 4), (5, 5)):
        matrix = torch.randn(shape, generator=seeded(3))
        factors = Delta({"unet.x": Dense(matrix)}).factors("unet.x")
        assert torch.equal(factors.update(), matrix)


def test_deltas_survive_a_round_trip_through_tensors_bit_for_bit() -> None:
    f = random_factors((20, 36), 2, 2.0, 5)
    conv = Delta.of(Adapter({"unet.conv.0": Factors(f.down, f.up, 2.0, (3, 3))}))
    total = delta_of(1, rank=2) + delta_of(2, rank=1) + conv
    tensors = delta_to_tensors(total, "delta/")
    assert all(key.startswith("delta/") for key in tensors)
    back = delta_from_tensors({**tensors, "other/unet.q.up": torch.zeros(1)}, "delta/")
    assert set(back) == set(total)
    for name, entry in total.items():
        read = back[name]
        assert type(read) is type(entry)
        assert read.kernel == entry.kernel
        if isinstance(entry, Stacked) and isinstance(read, Stacked):
            assert read.blocks == entry.blocks
            assert torch.equal(read.up, entry.up)
            assert torch.equal(read.down, entry.down)
        else:
            assert torch.equal(read.dense(), entry.dense())


@pytest.mark.parametrize("missing", ["up", "down", "blocks"])
def test_a_delta_that_lacks_a_part_is_an_error(missing: str) -> None:
    tensors = delta_to_tensors(delta_of(1).restrict(["unet.wide"]), "")
    del tensors[f"unet.wide.{missing}"]
    with pytest.raises(FileFormatError, match=r"unet\.wide"):
        delta_from_tensors(tensors, "")


@pytest.mark.parametrize("alpha", [1.0, 0.1, 1 / 3, 64.0])
def test_adapters_survive_a_round_trip_with_the_exact_alpha(alpha: float) -> None:
    f = random_factors((20, 36), 2, alpha, 5)
    adapter = Adapter(
        {**random_adapter(1, alpha=alpha), "unet.c": Factors(f.down, f.up, 1, (3, 3))}
    )
    back = adapter_from_tensors(adapter_to_tensors(adapter, "adapter/"), "adapter/")
    assert set(back) == set(adapter)
    for name, factors in adapter.items():
        read = back[name]
        assert (read.alpha, read.rank, read.kernel) == (factors.alpha, factors.rank, factors.kernel)
        assert torch.equal(read.up, factors.up)
        assert torch.equal(read.down, factors.down)


@pytest.mark.parametrize("part", ["up", "down", "alpha"])
def test_an_adapter_that_lacks_a_part_is_an_error(part: str) -> None:
    tensors = adapter_to_tensors(random_adapter(1), "")
    del tensors[f"unet.a.{part}"]
    with pytest.raises(FileFormatError, match=rf"unet\.a\.{part}"):
        adapter_from_tensors(tensors, "")


def test_tensors_of_a_delta_hold_nothing_that_needs_pickle() -> None:
    for tensors in (delta_to_tensors(delta_of(1), ""), adapter_to_tensors(random_adapter(1), "")):
        assert all(type(t) is torch.Tensor for t in tensors.values())
        json.dumps(sorted(tensors))


def test_dense_modules_of_one_size_share_their_identity_in_an_exact_lora():
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(6, 4, generator=generator) for name in ("a", "b")}
    weights["c"] = torch.randn(3, 4, generator=generator)
    adapter = Delta({name: Dense(w) for name, w in weights.items()}).as_adapter()
    assert adapter["a"].down.data_ptr() == adapter["b"].down.data_ptr()
    assert adapter["a"].up.data_ptr() == weights["a"].data_ptr()
    for name, weight in weights.items():
        assert torch.equal(adapter[name].update(), weight)
