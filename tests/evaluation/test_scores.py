"""Hand-worked examples of every number in a table."""

import math

import numpy as np
import pytest

from lcp_plugin.evaluation import scores
from lcp_plugin.evaluation.tables import (
    Column,
    Row,
    Table,
    escape_latex,
    format_number,
    to_csv,
    to_latex,
    to_markdown,
)

NAN = math.nan
# three tasks; the second one is best after the third (it gained), the first lost .3 of .8
HAND = np.array([[0.8, 0.6, 0.5], [NAN, 0.5, 0.6], [NAN, NAN, 0.7]])


def test_a_matrix_is_nan_where_after_is_before_the_task():
    matrix = scores.fill_matrix({(0, 0): 0.8, (0, 1): 0.6, (1, 1): 0.5}, tasks=2)
    assert np.isnan(matrix[1, 0])
    np.testing.assert_array_equal(matrix[0], [0.8, 0.6])
    assert matrix[1, 1] == 0.5


def test_a_cell_of_a_task_not_yet_learned_is_refused():
    with pytest.raises(ValueError, match="task 1, after 0"):
        scores.fill_matrix({(1, 0): 0.3}, tasks=2)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 2.0]], "shape"),
        ([[1.0, NAN], [NAN, 1.0]], "missing"),
        ([[1.0, 1.0], [0.5, 1.0]], "not learned yet"),
    ],
)
def test_a_matrix_of_a_wrong_form_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        scores.score_matrix(matrix)


def test_every_number_of_a_run_equals_the_hand_worked_example():
    summary = scores.score_matrix(HAND, base=0.3)
    assert summary.average_score == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert summary.forgetting == pytest.approx((0.3 + 0.0 + 0.0) / 3)
    # over i < 3 with the best before the last task: (.8 - .5) and (.5 - .6)
    assert summary.forgetting_chaudhry == pytest.approx((0.3 - 0.1) / 2)
    assert summary.peak == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert summary.peak == pytest.approx(summary.average_score + summary.forgetting)
    assert summary.retention == pytest.approx((0.6 - 0.3) / (0.7 - 0.3))
    assert summary.learning_score == pytest.approx((0.8 + 0.5 + 0.7) / 3)
    assert summary.worst_task == 0.5


def test_of_nothing_gained_no_share_is_left():
    matrix = [[0.2, 0.1], [np.nan, 0.3]]  # S .2, peak .25
    assert scores.score_matrix(matrix, base=0.1).retention == pytest.approx(0.1 / 0.15)
    for base in (0.25, 0.4):
        assert math.isnan(scores.score_matrix(matrix, base=base).retention)


def test_a_single_task_forgets_nothing_and_has_no_chaudhry_forgetting():
    summary = scores.score_matrix([[0.4]])
    assert summary.forgetting == 0
    assert summary.to_json()["forgetting_chaudhry"] is None
    assert summary.to_json()["retention"] is None


def test_runs_are_spread_with_the_population_standard_deviation():
    assert scores.spread([1.0, 3.0]) == scores.Spread(2.0, 1.0, 2)
    assert scores.spread([1.0, NAN, 3.0]).count == 2
    assert scores.spread([]).count == 0


def test_figure_one_follows_the_first_task_over_runs_of_different_length():
    curve = scores.tasks_since([HAND, np.array([[0.6, 0.4], [NAN, 0.9]])])
    assert [round(p.mean, 9) for p in curve] == [0.7, 0.5, 0.5]
    assert [p.count for p in curve] == [2, 2, 1]


def test_the_bootstrap_of_two_pairs_is_the_hand_worked_distribution():
    # differences .1 and .3: means .1, .2, .2, .3; quantiles .25 and .75 interpolate to .175, .225
    interval = scores.bootstrap_difference([0.5, 0.7], [0.4, 0.4], level=0.5)
    assert interval.difference == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((0.175, 0.225))


def test_equal_pairs_have_an_interval_of_no_width_whatever_their_number():
    for count in (3, 20):
        interval = scores.bootstrap_difference([1.0] * count, [0.5] * count)
        assert (interval.low, interval.high) == (0.5, 0.5)


def test_many_pairs_are_resampled_within_the_normal_theory_interval():
    rng = np.random.default_rng(1)
    a = rng.normal(1.0, 1.0, 400)
    interval = scores.bootstrap_difference(list(a), [0.0] * 400)
    half = 1.96 * a.std() / 20
    assert interval.low == pytest.approx(a.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(a.mean() + half, abs=0.02)


def test_pairs_of_different_number_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        scores.bootstrap_difference([1.0, 2.0], [1.0])


def test_one_image_against_itself_scores_one_and_a_set_its_mean_pairwise_cosine():
    one = np.array([[0.6, 0.8]])
    assert scores.mean_cosine(one, one) == pytest.approx(1.0)
    both = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert scores.mean_cosine(both, both) == pytest.approx((1 + 0.6 + 0.6 + 1) / 4)


def test_a_shuffled_reference_set_changes_nothing_to_the_last_bit():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(41, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    once = scores.mean_cosine(rows[:7], rows)
    assert scores.mean_cosine(rows[:7], rng.permutation(rows)) == once
    assert once == pytest.approx((rows[:7] @ rows.T).mean())


def test_diversity_is_one_minus_the_mean_cosine_of_different_images():
    assert scores.diversity([[1.0, 0.0], [0.6, 0.8]]) == pytest.approx(0.4)
    assert scores.diversity([[1.0, 0.0], [1.0, 0.0]]) == pytest.approx(0.0)
    assert math.isnan(scores.diversity([[1.0, 0.0]]))


def test_rank_correlation_is_spearmans_with_shared_ranks():
    assert scores.rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert scores.rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, norms sqrt(4.5 * 5)
    expected = 4.5 / math.sqrt(4.5 * 5)
    assert scores.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(expected)
    assert scores.rank_correlation([1, NAN, 2], [5, 6, 7]) == pytest.approx(1)
    assert math.isnan(scores.rank_correlation([1, 1], [1, 2]))


def test_losses_are_normalised_between_the_base_and_the_model_of_one_task():
    values = scores.normalise_losses(
        [[0.2, 0.3], [NAN, 0.5]], base=[0.4, 0.5], independent=[0.2] * 2
    )
    np.testing.assert_allclose(values, [[1.0, 0.5], [NAN, 0.0]])
    assert np.isnan(scores.normalise_losses([[0.1]], base=[0.2], independent=[0.2])).all()


POSTER = Table(
    columns=(Column("DINO S"), Column("F", lower_is_better=True)),
    rows=(
        Row("base", (scores.Spread(0.304, 0.0, 1), None), competes=False),
        Row("naive", (scores.Spread(0.402, 0.029, 8), scores.Spread(0.144, 0.039, 8))),
        Row("merge_init", (scores.Spread(0.457, 0.011, 8), scores.Spread(0.056, 0.009, 8))),
        Row("magmax", (scores.Spread(0.408, 0.006, 8), scores.Spread(0.036, 0.006, 8))),
    ),
)


def test_the_posters_rows_are_ranked_with_best_bold_and_second_underlined():
    lines = to_markdown(POSTER).splitlines()
    assert lines[0] == "| strategy | DINO S ↑ | F ↓ |"
    assert lines[2] == "| base | .304 | – |"
    assert lines[4] == "| merge_init | **.457 ± .011** | <u>.056 ± .009</u> |"
    assert lines[5] == "| magmax | <u>.408 ± .006</u> | **.036 ± .006** |"


def test_latex_is_escaped_and_marks_the_same_cells():
    text = to_latex(POSTER)
    assert (
        r"merge\_init & \textbf{.457\,\textpm\,.011} & \underline{.056\,\textpm\,.009} \\" in text
    )
    assert r"F $\downarrow$" in text
    assert escape_latex("a_b & 5% {x}") == r"a\_b \& 5\% \{x\}"


def test_csv_keeps_full_precision_and_the_number_of_runs():
    lines = to_csv(POSTER).splitlines()
    assert lines[0] == "strategy,DINO S,DINO S std,DINO S runs,F,F std,F runs"
    assert lines[1] == "base,0.304,0.0,1,,,0"


def test_figures_that_print_alike_share_the_mark():
    one, two = scores.Spread(0.4001, 0, 1), scores.Spread(0.4004, 0, 1)
    table = Table((Column("S"),), (Row("a", (one,)), Row("b", (two,))))
    assert table.ranks == ((1,), (1,))


@pytest.mark.parametrize(
    ("value", "text"), [(0.4567, ".457"), (-0.02, "-.020"), (1.0, "1.000"), (-0.0001, ".000")]
)
def test_numbers_print_without_a_leading_zero(value, text):
    assert format_number(value) == text
