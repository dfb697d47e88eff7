"""Merges of adapters trained apart: exact sums, and what each method promises."""

from __future__ import annotations

import pytest
import torch
from lora_samples import CONV, OUT, Q, factors, mixed_adapter

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delivery.merging import MergeOptions, keep_largest, merge_deltas, row_basis
from lcp_plugin.delta import Delta, Dense, Stacked
from lcp_plugin.errors import ConfigError, FileFormatError


def dense(*rows: list[float]) -> Delta:
    return Delta({Q: Dense(torch.tensor(rows))})


def exact(adapter: Adapter, name: str) -> torch.Tensor:
    """The update in float64, from the definition."""
    f = adapter[name]
    return f.alpha / f.rank * f.up.double() @ f.down.double()


def several() -> list[Adapter]:
    """Three adapters of other ranks, alphas and modules."""
    second = {Q: factors((8, 6), 1, 5.0, 10), OUT: factors((6, 6), 4, 0.5, 11)}
    third = {Q: factors((8, 6), 2, 2.0, 12), CONV: factors((4, 36), 3, 1.0, 13, (3, 3))}
    return [mixed_adapter(), Adapter(second), Adapter(third)]


def test_kohyas_scalar_example_sums_to_what_was_wanted() -> None:
    # reference/kohya.md 0.11: (up, down) = (2, 3) and (4, 5), ratios .7 and .4: 4.2 + 8 = 12.2
    scalar = [
        Delta.of(Adapter({Q: Factors(torch.tensor([[d]]), torch.tensor([[u]]), 1.0)}))
        for u, d in ((2.0, 3.0), (4.0, 5.0))
    ]
    assert merge_deltas(scalar, [0.7, 0.4]).delta[Q].dense().item() == pytest.approx(12.2, rel=1e-6)
    assert merge_deltas(scalar).delta[Q].dense().item() == 26.0


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.5, 0.25], [0.0, 1.0, 0.0]])
def test_sums_of_other_ranks_and_alphas_equal_the_float64_sum(weights: list[float]) -> None:
    adapters = several()
    merged = merge_deltas([Delta.of(a) for a in adapters], weights).delta
    for name in set().union(*adapters):
        parts = [w * exact(a, name) for a, w in zip(adapters, weights, strict=True) if name in a]
        wanted = torch.stack(parts).sum(0)
        if name not in merged:
            assert not wanted.any()
            continue
        torch.testing.assert_close(merged[name].dense().double(), wanted, rtol=1e-5, atol=1e-5)
        assert merged[name].kernel == next(a[name].kernel for a in adapters if name in a)


def test_a_sum_keeps_the_first_factors_of_every_part() -> None:
    wide = [Delta.of(Adapter({Q: factors((40, 30), r, 1.0, r)})) for r in (2, 3)]
    merged = merge_deltas(wide, [1.0, -2.0]).delta[Q]
    assert isinstance(merged, Stacked)
    assert merged.blocks == (2, 3)
    assert torch.equal(merged.down[:2], wide[0][Q].down)  # type: ignore[union-attr]


def test_magmax_takes_the_larger_entry_and_the_later_of_equals() -> None:
    merged = merge_deltas(
        [dense([1.0, -3.0, 2.0]), dense([-2.0, 1.0, -2.0])], None, MergeOptions("magmax")
    )
    assert merged.delta[Q].dense().tolist() == [[-2.0, -3.0, -2.0]]


def test_magmax_compares_weighted_updates() -> None:
    merged = merge_deltas(
        [dense([1.0, 4.0]), dense([-2.0, 1.0])], [3.0, 1.0], MergeOptions("magmax")
    )
    assert merged.delta[Q].dense().tolist() == [[3.0, 12.0]]


def test_ties_trims_elects_and_averages_those_that_agree() -> None:
    # density .5 keeps two entries of four: [4, 0, 3, 0], [2, 0, -5, 0], [0, 6, 0, 1->0 or so]
    deltas = [
        dense([4.0, 1.0, 3.0, 0.5]),
        dense([2.0, 1.0, -5.0, 0.5]),
        dense([-1.0, 6.0, -4.0, 0.5]),
    ]
    merged = merge_deltas(deltas, None, MergeOptions("ties", density=0.5)).delta[Q].dense()
    # signs: 4 + 2 > 0; 6 > 0; 3 - 5 - 4 < 0; nothing. Means: (4 + 2)/2, 6, (-5 - 4)/2, 0
    assert merged.tolist() == [[3.0, 6.0, -4.5, 0.0]]


def test_dare_drops_and_rescales_and_is_the_same_for_one_seed() -> None:
    ones = Delta({Q: Dense(torch.ones(200, 200))})
    options = MergeOptions("dare", density=0.25, seed=3)
    merged = merge_deltas([ones], None, options).delta[Q].dense()
    assert set(merged.flatten().tolist()) == {0.0, 4.0}
    assert merged.mean().item() == pytest.approx(1.0, abs=0.05)  # sd .0087: six of them
    assert torch.equal(merged, merge_deltas([ones], None, options).delta[Q].dense())
    other = MergeOptions("dare", density=0.25, seed=4)
    assert not torch.equal(merged, merge_deltas([ones], None, other).delta[Q].dense())


def test_orthogonal_leaves_earlier_adapters_their_own_inputs() -> None:
    first, second = (Delta.of(Adapter({Q: factors((20, 30), 3, 3.0, s)})) for s in (0, 1))
    merged = merge_deltas([first, second], None, MergeOptions("orthogonal")).delta[Q]
    own = first[Q].down.T  # type: ignore[union-attr]  # (in, 3): inputs that the first responds to
    torch.testing.assert_close(merged.dense() @ own, first[Q].dense() @ own, rtol=1e-4, atol=1e-3)
    assert isinstance(merged, Stacked)
    assert merged.blocks == (3, 3)
    away = torch.linalg.svd(first[Q].down).Vh[3:].T  # type: ignore[union-attr]
    torch.testing.assert_close(
        merged.dense() @ away, second[Q].dense() @ away, rtol=1e-4, atol=1e-3
    )


def test_energy_protects_only_the_strongest_inputs() -> None:
    # rows of energies 9 and 1: .9 of the energy is in the first
    entry = Stacked(torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (2,))
    assert row_basis(entry, 1.0).shape == (2, 3)
    assert row_basis(entry, 0.9).abs().tolist() == [[1.0, 0.0, 0.0]]
    assert row_basis(Dense(torch.zeros(2, 3))).shape == (0, 3)


def test_a_rank_truncates_optimally_and_says_the_error() -> None:
    # orthogonal rank-one parts of singular values 4 and 3: at rank 1, 3 of norm 5 is lost
    parts = [
        Delta({Q: Stacked(s * torch.eye(20)[:, i : i + 1], torch.eye(20)[i : i + 1], (1,))})
        for i, s in enumerate((4.0, 3.0))
    ]
    merged = merge_deltas(parts, None, MergeOptions("sum", rank=1))
    assert merged.errors[Q] == pytest.approx(0.6, rel=1e-5)
    assert merged.error == pytest.approx(0.6, rel=1e-5)
    wanted = torch.zeros(20, 20)
    wanted[0, 0] = 4.0
    torch.testing.assert_close(merged.delta[Q].dense(), wanted)


def test_scale_multiplies_the_result() -> None:
    merged = merge_deltas([dense([1.0, -2.0])], None, MergeOptions("magmax", scale=0.5))
    assert merged.delta[Q].dense().tolist() == [[0.5, -1.0]]


def test_inputs_are_not_changed() -> None:
    deltas = [Delta.of(a) for a in several()]
    before = [{n: e.dense().clone() for n, e in d.items()} for d in deltas]
    for method in ("sum", "magmax", "ties", "dare", "orthogonal"):
        merge_deltas(deltas, [0.5, -1.0, 2.0], MergeOptions(method, rank=1))
    after = [{n: e.dense() for n, e in d.items()} for d in deltas]
    assert all(torch.equal(b[n], a[n]) for b, a in zip(before, after, strict=True) for n in b)


def test_keep_largest_keeps_the_share_asked_for() -> None:
    matrix = torch.arange(1.0, 11.0).view(2, 5)
    assert keep_largest(matrix, 0.3).count_nonzero() == 3
    assert keep_largest(matrix, 1.0).count_nonzero() == 10


def test_other_bases_and_wrong_weights_are_refused() -> None:
    with pytest.raises(FileFormatError, match="different bases"):
        merge_deltas([dense([1.0, 2.0]), dense([1.0])])
    with pytest.raises(ConfigError, match="2 adapters and 1 weight;"):
        merge_deltas([dense([1.0]), dense([1.0])], [1.0])
    with pytest.raises(ConfigError, match="nothing|0 adapters"):
        merge_deltas([])
    with pytest.raises(ConfigError) as caught:
        MergeOptions("average", density=2, energy=0, rank=-1)
    assert len(caught.value.problems) == 4
