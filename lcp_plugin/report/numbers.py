"""Scores as the page prints them: tables, intervals, Figure 1, heat maps, the extra measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.scores import Matrix
from lcp_plugin.evaluation.tables import Column, Row, Table, format_number
from lcp_plugin.report.figures import as_markup, draw_tasks_since
from lcp_plugin.report.read import Facts, MetricScores, RunFacts, TaskFacts

TITLES = {
    "clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "dinov2": "DINOv2", "csd": "CSD",
    "effnet": "EffNet",
}  # fmt: skip
EXTRA_TITLES = {
    "bleed": "Bleeding", "leakage": "Class-word leakage", "drift": "Drift of everything else",
    "diversity": "Diversity", "multi": "Two concepts at once", "losses": "Without images",
    "recognition": "Recognised",
}  # fmt: skip
SHOWN = {
    "average_score": "S",
    "forgetting": "F",
    "peak": "peak",
    "retention": "retention",
    "worst_task": "worst task",
}


def build_score_table(
    metric: str,
    runs: Sequence[RunFacts],
    matrices: Sequence[Mapping[str, MetricScores]],
    scores: Facts,
) -> Table:
    """One row per strategy, mean over its runs, under the base's row."""
    title = TITLES.get(metric, metric)
    columns = tuple(Column(text, key in measures.LOWER_IS_BETTER) for key, text in SHOWN.items())
    groups: dict[str, list[measures.Summary]] = {}
    bases = []
    for run, found in zip(runs, matrices, strict=True):
        if metric in found:
            base = mean_of(found[metric].base)
            bases.append(base)
            groups.setdefault(run.strategy, []).append(
                measures.summarise(found[metric].matrix, base)
            )
    rows = [Row("base", (measures.spread(bases), *[None] * (len(columns) - 1)), competes=False)]
    for strategy, summaries in groups.items():
        cells = tuple(measures.spread([getattr(s, key) for s in summaries]) for key in SHOWN)
        rows.append(Row(strategy, cells, competes=len(groups) > 1))
    rows += _ceiling_rows(metric, scores, len(columns))
    caption = f"{title}, mean ± standard deviation over runs." if len(runs) > 1 else title
    return Table(columns, tuple(rows), corner=title, caption=caption)


def _ceiling_rows(metric: str, scores: Facts, columns: int) -> list[Row]:
    """Bounds that were scored with the runs: their average score only."""
    finals: dict[str, list[float]] = {}
    for entry in scores.get("runs", ()):
        found = entry.get("metrics", {}).get(metric, {})
        if entry.get("ceiling") and entry.get("stages") and "average_score" in found:
            finals.setdefault(str(entry["strategy"]), []).append(float(found["average_score"]))
    empty: list[None] = [None] * (columns - 1)
    return [
        Row(f"{name.replace('_', ' ')} (bound)", (measures.spread(values), *empty), competes=False)
        for name, values in finals.items()
    ]


def describe_differences(scores: Sequence[Facts]) -> list[dict[str, Any]]:
    found = [d for s in scores for d in s.get("differences", ()) if d.get("measure") in SHOWN]
    return [
        {
            "measure": f"{TITLES.get(d['metric'], d['metric'])} {SHOWN[d['measure']]}",
            "pair": f"{d['a']} − {d['b']}",
            "difference": _signed(d["difference"]),
            "interval": f"{_signed(d['low'])} to {_signed(d['high'])}",
            "pairs": d["pairs"],
            "certain": d["low"] > 0 or d["high"] < 0,
        }
        for d in found
    ]


def draw_figure_one(
    metric: str, runs: Sequence[RunFacts], matrices: Sequence[Mapping[str, MetricScores]]
) -> dict[str, Any]:
    title = TITLES.get(metric, metric)
    groups: dict[str, list[Matrix]] = {}
    bases = []
    for run, found in zip(runs, matrices, strict=True):
        if metric in found:
            groups.setdefault(run.strategy, []).append(found[metric].matrix)
            bases.append(found[metric].base[0])
    curves = {name: measures.tasks_since(group) for name, group in groups.items()}
    has_band = any(len(group) > 1 for group in groups.values())
    caption = (
        f"Figure 1: {title} on the first task while further tasks are learned"
        + ("; the band is one standard deviation over runs" if has_band else "")
        + ". The dotted line is the base model, which never learned it."
    )
    svg = draw_tasks_since(curves, measures.spread(bases), title, f"since-{metric}")
    return {"svg": as_markup(svg), "caption": caption}


def describe_extras(scores: Sequence[Facts], runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every measure of --extras: its sentence, and a table over the runs or a map."""
    found = next((s["extras"] for s in scores if s.get("extras")), None)
    if found is None:
        return []
    labels = {run.folder.name: run.label for run in runs}
    shown = {n: e for n, e in found.get("runs", {}).items() if n in labels}
    described = []
    for name, sentence in found.get("about", {}).items():
        rows = [
            {"name": labels[run], "numbers": extra_values(name, extras[name])}
            for run, extras in shown.items()
            if name in extras
        ]
        maps = _extra_maps(name, shown, runs[0]) if len(shown) == 1 else []
        if rows:
            described.append(
                {"title": EXTRA_TITLES.get(name, name), "about": sentence, "rows": rows,
                 "columns": [key for key, _ in rows[0]["numbers"]], "maps": maps}
            )  # fmt: skip
    return described


def extra_values(name: str, facts: Facts) -> list[tuple[str, str]]:
    """The few numbers of a measure that fit into a row."""
    if name == "bleed":
        pairs = [("off the diagonal", "matrix"), ("base, off the diagonal", "base")]
        numbers = [(title, _off_diagonal(facts[key])) for title, key in pairs]
    elif name == "drift":
        numbers = [(f"after {i}", value) for i, value in enumerate(facts["after"], 1)]
    elif name == "diversity":
        means = {key: mean_of([v for v in facts[key].values() if v is not None]) for key in facts}
        numbers = [(key, means[key]) for key in ("final", "base")]
    elif name == "recognition":
        means = facts["mean"]
        numbers = [(f"recognised, {key}", means[key]) for key in ("learned", "final", "base")]
        numbers.append(("way covered", _number(means["covered"])))
    elif name == "losses":
        final = [row[-1] for row in facts["normalised"] if row[-1] is not None]
        drifted = [row[-1] for row in facts["self_drift"] if row[-1] is not None]
        numbers = [("normalised, final", mean_of(final)), ("self-drift, final", mean_of(drifted))]
        ranks = facts["rank_correlation"]
        numbers += [
            (f"rank correlation of {title} with the scores", _number(ranks[key]))
            for title, key in (("loss gain", "loss_gain"), ("self-drift", "self_drift"))
        ]
    else:
        numbers = [("mean", _number(facts.get("mean")))]
    return [(key, "–" if math.isnan(v) else format_number(v)) for key, v in numbers]


def _extra_maps(name: str, shown: Facts, run: RunFacts) -> list[dict[str, Any]]:
    """Of a single run, bleed and losses as coloured tables."""
    extras = next(iter(shown.values()))
    if name == "bleed" and name in extras:
        return [
            _concept_map(extras[name]["matrix"], run, "final model"),
            _concept_map(extras[name]["base"], run, "base model"),
        ]
    return []


def _concept_map(rows: Sequence[Sequence[float]], run: RunFacts, title: str) -> dict[str, Any]:
    low, high = min(min(r) for r in rows), max(max(r) for r in rows)
    names = [t.concept for t in run.tasks]
    return {
        "title": title,
        "columns": names,
        "rows": [
            {"name": name, "cells": [_heat_cell(v, low, high) for v in row]}
            for name, row in zip(names, rows, strict=False)
        ],
        "caption": "Rows: prompts of a concept; columns: pictures of a concept.",
    }


def _off_diagonal(rows: Sequence[Sequence[float]]) -> float:
    return mean_of([v for i, row in enumerate(rows) for j, v in enumerate(row) if i != j])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def describe_heat_map(
    metric: str, found: MetricScores, tasks: Sequence[TaskFacts]
) -> dict[str, Any]:
    """R[i, j] as a coloured table, the base in front where it was scored."""
    has_base = not all(math.isnan(b) for b in found.base)
    values = found.matrix
    if has_base:
        values = np.column_stack([np.asarray(found.base), values])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    names = [t.concept for t in tasks]
    rows = [
        {
            "name": names[i] if i < len(names) else str(i + 1),
            "cells": [_heat_cell(v, low, high) for v in row.tolist()],
        }
        for i, row in enumerate(values)
    ]
    columns = [f"after {t.index}" for t in tasks][: found.matrix.shape[1]]
    return {
        "title": TITLES.get(metric, metric),
        "rows": rows,
        "columns": ["base", *columns] if has_base else columns,
        "caption": "Rows are concepts, columns the model after each task: the diagonal is the "
        "moment of learning, what fades to its right is forgotten.",
    }


def _heat_cell(value: float, low: float, high: float) -> dict[str, Any]:
    if math.isnan(value):
        return {"text": "", "shade": 0}
    share = (value - low) / (high - low) if high > low else 0.5
    return {"text": format_number(value, 2), "shade": round(6 + 84 * share)}


def mean_of(values: Sequence[float]) -> float:
    """Of the finite values; NaN where there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _signed(value: float) -> str:
    text = format_number(value)
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"
