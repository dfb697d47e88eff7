"""Scores as the page prints them: tables, intervals, Figure 1, heat maps, the extra measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.metric_table import title_of
from lcp_plugin.evaluation.scores import Matrix
from lcp_plugin.evaluation.tables import Column, Row, Table, format_number
from lcp_plugin.report.blocks import Cell, Figure, Map
from lcp_plugin.report.figures import as_markup, draw_tasks_since
from lcp_plugin.report.material import Material, MetricScores
from lcp_plugin.report.read import Facts, RunFacts, TaskFacts

SHOWN = {
    "average_score": "S",
    "forgetting": "F",
    "peak": "peak",
    "retention": "retention",
    "worst_task": "worst task",
}


def build_score_table(metric: str, material: Material) -> Table:
    """One row per strategy, mean over its runs, under the base's row."""
    title = title_of(metric)
    columns = tuple(Column(text, key in measures.LOWER_IS_BETTER) for key, text in SHOWN.items())
    groups: dict[str, list[measures.RunScores]] = {}
    bases = []
    for one in material.runs:
        if metric in one.matrices:
            found = one.matrices[metric]
            bases.append(mean_of(found.base))
            numbers = measures.score_matrix(found.matrix, bases[-1])
            groups.setdefault(one.run.strategy, []).append(numbers)
    rows = [Row("base", (measures.spread(bases), *[None] * (len(columns) - 1)), competes=False)]
    for strategy, group in groups.items():
        cells = tuple(measures.spread([getattr(n, key) for n in group]) for key in SHOWN)
        rows.append(Row(strategy, cells, competes=len(groups) > 1))
    rows += _ceiling_rows(metric, material.scores[0] if material.scores else {}, len(columns))
    several = "mean ± standard deviation over runs."
    caption = f"{title}, {several}" if material.is_comparison else title
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
            "measure": f"{title_of(d['metric'])} {SHOWN[d['measure']]}",
            "pair": f"{d['a']} − {d['b']}",
            "difference": _signed(d["difference"]),
            "interval": f"{_signed(d['low'])} to {_signed(d['high'])}",
            "pairs": d["pairs"],
            "certain": d["low"] > 0 or d["high"] < 0,
        }
        for d in found
    ]


def draw_figure_one(metric: str, material: Material) -> Figure:
    """Score on the first task while further tasks are learned, a curve per strategy."""
    title = title_of(metric)
    groups: dict[str, list[Matrix]] = {}
    bases = []
    for one in material.runs:
        if metric in one.matrices:
            groups.setdefault(one.run.strategy, []).append(one.matrices[metric].matrix)
            bases.append(one.matrices[metric].base[0])
    curves = {name: measures.tasks_since(group) for name, group in groups.items()}
    has_band = any(len(group) > 1 for group in groups.values())
    caption = (
        f"Figure 1: {title} on the first task while further tasks are learned"
        + ("; the band is one standard deviation over runs" if has_band else "")
        + ". The dotted line is the base model, which never learned it."
    )
    svg = draw_tasks_since(curves, measures.spread(bases), title, f"since-{metric}")
    return Figure(as_markup(svg), caption)


def describe_extras(scores: Sequence[Facts], runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every measure of --extras: its sentence, and a table over the runs or a map."""
    found = next((s["extras"] for s in scores if s.get("extras")), None)
    if found is None:
        return []
    from lcp_plugin.evaluation.extras import EXTRAS

    labels = {run.folder.name: run.label for run in runs}
    shown = {n: e for n, e in found.get("runs", {}).items() if n in labels}
    described = []
    for name, sentence in found.get("about", {}).items():
        rows = [
            {"name": labels[run], "numbers": extra_values(name, extras[name])}
            for run, extras in shown.items()
            if name in extras and name in EXTRAS
        ]
        maps = _extra_maps(name, shown, runs[0]) if len(shown) == 1 else []
        if rows:
            described.append(
                {
                    "title": EXTRAS[name].title,
                    "about": sentence,
                    "rows": rows,
                    "columns": [key for key, _ in rows[0]["numbers"]],
                    "maps": maps,
                }
            )
    return described


def extra_values(name: str, facts: Facts) -> list[tuple[str, str]]:
    """The few numbers of a measure that fit into a row."""
    from lcp_plugin.evaluation.extras import EXTRAS

    numbers = EXTRAS[name].numbers(facts)
    return [(key, "–" if math.isnan(v) else format_number(v)) for key, v in numbers]


def _extra_maps(name: str, shown: Facts, run: RunFacts) -> list[Map]:
    """Of a single run, what runs into what as coloured tables."""
    extras = next(iter(shown.values()))
    if name == "bleed" and name in extras:
        return [
            _concept_map(extras[name]["matrix"], run, "final model"),
            _concept_map(extras[name]["base"], run, "base model"),
        ]
    return []


def _concept_map(rows: Sequence[Sequence[float]], run: RunFacts, title: str) -> Map:
    low, high = min(min(r) for r in rows), max(max(r) for r in rows)
    names = [t.concept for t in run.tasks]
    return Map(
        title,
        names,
        [
            (name, [_shaded(v, low, high) for v in row])
            for name, row in zip(names, rows, strict=False)
        ],
        "Rows: prompts of a concept; columns: pictures of a concept.",
    )


def draw_score_map(metric: str, found: MetricScores, tasks: Sequence[TaskFacts]) -> Map:
    """R[i, j] as a coloured table, the base in front where it was scored."""
    has_base = not all(math.isnan(b) for b in found.base)
    values = found.matrix
    if has_base:
        values = np.column_stack([np.asarray(found.base), values])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    names = [t.concept for t in tasks]
    columns = [f"after {t.index}" for t in tasks][: found.matrix.shape[1]]
    return Map(
        title_of(metric),
        ["base", *columns] if has_base else columns,
        [
            (names[i] if i < len(names) else str(i + 1), [_shaded(v, low, high) for v in row])
            for i, row in enumerate(values.tolist())
        ],
        "Rows are concepts, columns the model after each task: the diagonal is the moment of "
        "learning, what fades to its right is forgotten.",
    )


def _shaded(value: float, low: float, high: float) -> Cell:
    if math.isnan(value):
        return Cell()
    share = (value - low) / (high - low) if high > low else 0.5
    return Cell(format_number(value, 2), round(6 + 84 * share))


def mean_of(values: Sequence[float]) -> float:
    """Of the finite values; NaN where there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _signed(value: float) -> str:
    text = format_number(value)
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"
