"""Runs to tables: means and spreads per strategy, paired differences, scores.json and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.evaluate import Evaluation
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.recognition import read_recognition, tell_recognised
from lcp_plugin.evaluation.scores import Matrix, RunScores, none_if_nan, score_matrix, spread
from lcp_plugin.evaluation.tables import Column, Row, Table, to_csv, to_latex, to_markdown
from lcp_plugin.formats.disk import write_bytes, write_json
from lcp_plugin.telling.wording import counted

COLUMNS = {
    "average_score": "S",
    "forgetting": "F",
    "forgetting_chaudhry": "F (Chaudhry)",
    "peak": "peak",
    "retention": "retention",
    "learning_score": "learning",
    "worst_task": "worst",
}
ROWS = {"independent": "independent (ceiling)", "joint": "joint (ceiling)",
        "merge_at_end": "merge at end (bound)"}  # fmt: skip


def matrix_of(entry: Mapping[str, Any], metric: str) -> Matrix:
    """A run's matrix back from scores.json, NaN for null."""
    rows = entry["metrics"][metric]["matrix"]
    filled = [[math.nan if v is None else float(v) for v in row] for row in rows]
    return measures.check_matrix(filled)


def scores_of_run(entry: Mapping[str, Any], metric: str) -> RunScores:
    """A run's numbers, from its matrix."""
    base = entry["metrics"][metric]["base"]
    return score_matrix(matrix_of(entry, metric), sum(base) / len(base))


def build_table(entries: Sequence[Mapping[str, Any]], metric: Metric) -> Table:
    """The paper's table: the base, every strategy's mean and std over runs, the ceilings."""
    columns = tuple(
        Column(title, key in measures.LOWER_IS_BETTER) for key, title in COLUMNS.items()
    )
    empty: list[None] = [None] * (len(columns) - 1)
    bases = [_mean(e["metrics"][metric.name]["base"]) for e in entries]
    rows = [Row("base", (spread(bases), *empty), competes=False)]
    groups = _by_label(e for e in entries if not e["ceiling"])
    for label, group in groups.items():
        numbers = [scores_of_run(e, metric.name) for e in group]
        cells = tuple(spread([getattr(n, key) for n in numbers]) for key in COLUMNS)
        rows.append(Row(label, cells, competes=len(groups) > 1))
    for label, group in _by_label(e for e in entries if e["ceiling"] and e["stages"]).items():
        finals = [e["metrics"][metric.name]["average_score"] for e in group]
        rows.append(Row(ROWS.get(label, label), (spread(finals), *empty), competes=False))
    caption = f"{metric.title}: mean and population std over runs; {metric.about}"
    return Table(columns, tuple(rows), corner=metric.title, caption=caption)


def _by_label(entries: Any) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["label"], []).append(entry)
    return groups


def compare_strategies(
    entries: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Paired bootstrap intervals of every two strategies over the (order, seed) they share."""
    groups = _by_label(e for e in entries if not e["ceiling"])
    found: list[dict[str, Any]] = []
    for (name_a, a), (name_b, b) in combinations(groups.items(), 2):
        pairs = _pair_runs(a, b)
        if len(pairs) < 2:
            continue
        for metric in metrics:
            numbers = [[scores_of_run(e, metric.name) for e in pair] for pair in pairs]
            for key in ("average_score", "forgetting", "peak", "retention"):
                left = [getattr(x, key) for x, _ in numbers]
                right = [getattr(y, key) for _, y in numbers]
                if any(math.isnan(v) for v in [*left, *right]):
                    continue
                interval = measures.bootstrap_difference(left, right)
                facts = {"a": name_a, "b": name_b, "metric": metric.name, "measure": key}
                found.append(facts | asdict(interval))
    return found


def _pair_runs(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Runs of the same tasks in the same order from the same seed."""
    keyed = {_pair_key(e): e for e in b}
    return [(e, keyed[_pair_key(e)]) for e in a if _pair_key(e) in keyed]


def _pair_key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["seed"], entry["order_seed"], tuple(entry["tasks"])


def collect_scores(
    evaluation: Evaluation, entries: Sequence[Mapping[str, Any]], extras: Mapping[str, Any]
) -> dict[str, Any]:
    """All of scores.json."""
    strategies: dict[str, Any] = {}
    for label, group in _by_label(e for e in entries if not e["ceiling"]).items():
        strategies[label] = {
            metric.name: {
                key: _spread_json([getattr(scores_of_run(e, metric.name), key) for e in group])
                for key in COLUMNS
            }
            for metric in evaluation.metrics
        }
        kept = count_kept(group)
        if kept:
            strategies[label]["recognised"] = _spread_json(kept)
    return {
        **evaluation.facts(),
        "runs": list(entries),
        "strategies": strategies,
        "differences": compare_strategies(entries, evaluation.metrics),
        **extras,
    }


def _spread_json(values: Sequence[float]) -> dict[str, Any]:
    over = spread(values)
    return {"mean": none_if_nan(over.mean), "std": none_if_nan(over.std), "runs": over.count}


def write_scores(evaluation: Evaluation, scores: Mapping[str, Any], output: Path) -> list[Table]:
    """scores.json, and per metric a table as .md, .csv and .tex and all cells; the tables."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "scores.json", scores)
    tables = [build_table(scores["runs"], metric) for metric in evaluation.metrics]
    for metric, table in zip(evaluation.metrics, tables, strict=True):
        for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
            write_bytes(output / f"{metric.name}.{suffix}", write(table).encode("utf-8"))
        matrices = matrices_csv(scores["runs"], metric)
        write_bytes(output / f"{metric.name}_matrices.csv", matrices.encode("utf-8"))
    return tables


def matrices_csv(entries: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Every cell of every run: run, task, after, score; the base as `after` = base."""
    lines = ["run,task,after,score"]
    for entry in entries:
        found, name = entry["metrics"][metric.name], entry["name"]
        tasks = entry["tasks"]
        cells = [(task, "base", v) for task, v in zip(tasks, found["base"], strict=True)]
        for task, row in zip(tasks, found.get("matrix", ()), strict=False):
            cells += [(task, a, v) for a, v in zip(tasks, row, strict=True) if v is not None]
        cells += [(t, "final", v) for t, v in zip(tasks, found.get("final", ()), strict=False)]
        lines += [f"{name},{task},{after},{value!r}" for task, after, value in cells]
    return "\n".join(lines) + "\n"


def count_kept(entries: Sequence[Mapping[str, Any]]) -> list[float]:
    """How many of its concepts each run still recognises at the end, where that was measured."""
    found = [read_recognition(entry) for entry in entries]
    return [float(len(one.kept)) for one in found if one is not None]


def tell_kept(entries: Sequence[Mapping[str, Any]]) -> str:
    """What is still recognised: of a single run with what became of the rest, of several a line per
    strategy; empty where it was not measured.
    """
    measured = [e for e in entries if not e["ceiling"] and e.get("recognition")]
    if len(measured) == 1:
        found = read_recognition(measured[0])
        return tell_recognised(found) if found else ""
    lines = []
    for label, group in _by_label(measured).items():
        kept, count = count_kept(group), len(group[0]["tasks"])
        runs = "" if len(group) == 1 else f" (mean of {len(group)} runs)"
        lines.append(f"still recognised: {label} {_mean(kept):.3g} of {count}{runs}")
    return "\n".join(lines)


def tell_differences(scores: Mapping[str, Any]) -> str:
    """One line per paired difference of S and F with its interval, and per rank correlation."""
    lines = []
    for d in scores["differences"]:
        if d["measure"] in ("average_score", "forgetting"):
            interval = f"[{d['low']:+.3f}, {d['high']:+.3f}]"
            lines.append(
                f"{d['metric']} {COLUMNS[d['measure']]}: {d['a']} - {d['b']} = "
                f"{d['difference']:+.3f} {interval} ({d['level']:.0%}, "
                f"{counted(d['pairs'], 'pair')})"
            )
    for name, extras in scores.get("extras", {}).get("runs", {}).items():
        for key, value in extras.get("losses", {}).get("rank_correlation", {}).items():
            told = "undefined" if value is None else f"{value:+.2f}"
            lines.append(f"{name}: rank correlation of {key} with the image scores {told}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
