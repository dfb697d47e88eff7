"""Scores of a run: R[i, j] is the score of the model after task j on task i, j >= i, NaN elsewhere.

    average score      S   = mean_i R[i, T]
    forgetting         F   = (1/T) sum_{i=1..T} (max_{j >= i} R[i, j] - R[i, T])       >= 0
    forgetting_chaudhry    = 1/(T-1) sum_{i<T} (max_{i <= j < T} R[i, j] - R[i, T])    any sign
    peak                   = mean_i max_{j >= i} R[i, j] = S + F
    retention              = (S - base) / (peak - base)
    learning score         = mean_i R[i, i]
    worst task             = min_i R[i, T]

F is the one of arXiv 2410.04891 (the last task, always 0, counts); the other is that of Chaudhry et
al. 2018 (arXiv 1801.10112). All are per run; runs are averaged afterwards, with the population
standard deviation. Rows and columns count tasks from 0 here; higher scores are better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix: TypeAlias = NDArray[np.float64]

MEASURES: Mapping[str, str] = {
    "average_score": "mean score of the final model over all tasks",
    "forgetting": "best score ever reached minus the final one, mean over all T tasks",
    "forgetting_chaudhry": "the same over the first T-1 tasks, best before the last task",
    "peak": "mean best score ever reached on each task",
    "retention": "share of the score gained over the base that is left at the end; a number's "
    "share, not the concepts'",
    "learning_score": "mean score on each task right after it was learned",
    "worst_task": "lowest score of the final model on any task",
}
LOWER_IS_BETTER = frozenset({"forgetting", "forgetting_chaudhry"})
CEILINGS = ("independent", "joint", "merge_at_end")  # bounds: each task has a score of its own


def count_cells(strategy: str, tasks: int) -> int:
    """How many entries R has for so many tasks, (task, state of the model) pairs."""
    return tasks if strategy in CEILINGS else tasks * (tasks + 1) // 2


@dataclass(frozen=True)
class RunScores:
    """The numbers of one run on one metric; NaN where a number is not defined."""

    average_score: float
    forgetting: float
    forgetting_chaudhry: float
    peak: float
    retention: float
    learning_score: float
    worst_task: float

    def to_json(self) -> dict[str, float | None]:
        """Name -> number, None for NaN: what JSON can hold."""
        return {name: none_if_nan(getattr(self, name)) for name in MEASURES}


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def fill_matrix(cells: Mapping[tuple[int, int], float], tasks: int) -> Matrix:
    """(task, after) -> score, both from 0, as a (tasks, tasks) matrix; NaN where after < task.

    Raises ValueError for a cell above the diagonal's time (a task not yet learned) or outside.
    """
    matrix = np.full((tasks, tasks), np.nan)
    for (task, after), score in cells.items():
        if not 0 <= task <= after < tasks:
            raise ValueError(f"cell (task {task}, after {after}) does not lie in {tasks} tasks")
        matrix[task, after] = score
    return matrix


def check_matrix(matrix: ArrayLike) -> Matrix:
    """The matrix as float64, if it is (T, T), has a number in every cell with after >= task and NaN
    elsewhere; ValueError otherwise.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"a score matrix is (tasks, tasks), this one has shape {values.shape}")
    learned = np.triu(np.ones(values.shape, dtype=bool))
    if np.isnan(values[learned]).any():
        raise ValueError("a score is missing in a cell whose task was already learned")
    if not np.isnan(values[~learned]).all():
        raise ValueError("a cell holds a score of a task that was not learned yet; wanted NaN")
    return values


def average_score(matrix: Matrix) -> float:
    """S: mean of the last column."""
    return float(matrix[:, -1].mean())


def best_scores(matrix: Matrix) -> Matrix:
    """max_{j >= i} R[i, j] of every task   # (tasks,)."""
    return np.asarray(np.nanmax(matrix, axis=1), dtype=np.float64)


def forgetting(matrix: Matrix) -> float:
    """F as in arXiv 2410.04891: the last task counts, never negative."""
    return float((best_scores(matrix) - matrix[:, -1]).mean())


def forgetting_chaudhry(matrix: Matrix) -> float:
    """The usual forgetting (arXiv 1801.10112); NaN for a single task."""
    if matrix.shape[0] < 2:
        return math.nan
    best = np.nanmax(matrix[:-1, :-1], axis=1)
    return float((best - matrix[:-1, -1]).mean())


def peak(matrix: Matrix) -> float:
    """Mean best score ever reached: S + F."""
    return float(best_scores(matrix).mean())


def retention(matrix: Matrix, base: float) -> float:
    """(S - base) / (peak - base); `base` is the base model's mean score on the same tasks.

    NaN where nothing was gained over the base, of which no share can be left.
    """
    gained = peak(matrix) - base
    return (average_score(matrix) - base) / gained if gained > 0 else math.nan


def learning_score(matrix: Matrix) -> float:
    """Mean of the diagonal: each task right after it was learned."""
    return float(np.diagonal(matrix).mean())


def worst_task(matrix: Matrix) -> float:
    """Lowest score of the final model."""
    return float(matrix[:, -1].min())


def score_matrix(matrix: ArrayLike, base: float = math.nan) -> RunScores:
    """All numbers of a run. Without a base score, retention is NaN."""
    values = check_matrix(matrix)
    return RunScores(
        average_score=average_score(values),
        forgetting=forgetting(values),
        forgetting_chaudhry=forgetting_chaudhry(values),
        peak=peak(values),
        retention=retention(values, base),
        learning_score=learning_score(values),
        worst_task=worst_task(values),
    )


@dataclass(frozen=True)
class Spread:
    """Mean and population standard deviation over `count` runs."""

    mean: float
    std: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Over the finite values; NaN and count 0 where there are none."""
    finite = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    if not finite.size:
        return Spread(math.nan, math.nan, 0)
    return Spread(float(finite.mean()), float(finite.std()), int(finite.size))


def tasks_since(matrices: Sequence[Matrix]) -> list[Spread]:
    """Figure 1: score on the first task k = 0, 1, ... tasks after it was learned, over runs."""
    longest = max(m.shape[1] for m in matrices)
    return [spread([float(m[0, k]) for m in matrices if k < m.shape[1]]) for k in range(longest)]


@dataclass(frozen=True)
class Interval:
    """A mean paired difference with its bootstrap percentile interval."""

    difference: float  # mean of a - b
    low: float
    high: float
    level: float
    pairs: int


EXACT_PAIRS = 6  # 6 ** 6 = 46,656 resamples: all of them are looked at


def bootstrap_difference(
    a: Sequence[float],
    b: Sequence[float],
    level: float = 0.95,
    resamples: int = 20_000,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over paired runs with its percentile bootstrap interval (Efron 1979).

    Runs are resampled as pairs (same order of tasks, same seed). Up to six pairs all n^n resamples
    are enumerated, so that the interval is exact; above that `resamples` are drawn.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"pairs are needed: got {len(a)} and {len(b)} values")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    count = differences.size
    if count <= EXACT_PAIRS:
        draws = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    means = differences[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high), level, count)


def mean_cosine(generated: ArrayLike, references: ArrayLike) -> float:
    """Mean cosine over all generated x reference pairs of L2-normalised rows (n, d), (m, d).

    Equal to the dot product of the two mean vectors; these are summed exactly (fsum), so the order
    of the images does not count.
    """
    return float(_mean_row(generated) @ _mean_row(references))


def _mean_row(rows: ArrayLike) -> Matrix:
    columns = np.asarray(rows, dtype=np.float64).T
    return np.array([math.fsum(column) / len(column) for column in columns.tolist()])


def diversity(embeddings: ArrayLike) -> float:
    """1 - mean cosine over all pairs of different rows; 0 when all images are the same."""
    rows = np.asarray(embeddings, dtype=np.float64)
    count = rows.shape[0]
    if count < 2:
        return math.nan
    cosines = rows @ rows.T
    return float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho over the places where both are finite; ties share their mean rank."""
    left, right = np.ravel(np.asarray(x, float)), np.ravel(np.asarray(y, float))
    both = np.isfinite(left) & np.isfinite(right)
    if both.sum() < 2:
        return math.nan
    ranks = np.stack([_ranks(left[both]), _ranks(right[both])])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1))
    return float(centred[0] @ centred[1] / norms.prod()) if norms.all() else math.nan


def _ranks(values: Matrix) -> Matrix:
    below = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, dtype=np.float64)


def normalise_losses(losses: ArrayLike, base: ArrayLike, independent: ArrayLike) -> Matrix:
    """(L_base - L) / (L_base - L_independent), row by row: 0 is the base, 1 a model that learned
    this task alone. `losses` (tasks, after); `base` and `independent` (tasks,).
    """
    rows = np.asarray(base, dtype=np.float64)[:, None]
    gained = rows - np.asarray(independent, dtype=np.float64)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (rows - np.asarray(losses, dtype=np.float64)) / gained
    return np.asarray(np.where(np.isfinite(values), values, np.nan), dtype=np.float64)
