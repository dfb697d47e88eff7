"""A run, or several side by side, as one page: everything that the template prints is decided here.

The template escapes every text; only the charts and the two style and script files pass as they
are. A content security policy in the page forbids every request and every script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.scores import Matrix, Spread
from lcp_plugin.evaluation.tables import Column, Row, Table, format_number
from lcp_plugin.report.figures import draw_losses, draw_opposition, draw_tasks_since
from lcp_plugin.report.pictures import Embedded, embed_picture
from lcp_plugin.report.read import (
    Facts,
    MetricScores,
    RunFacts,
    TaskFacts,
    find_scores,
    read_run,
    read_scores,
    scores_of,
)

HERE = Path(__file__).resolve().parent
PER_CELL = 6  # pictures of one concept at one stage
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TITLES = {
    "clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO", "dinov2": "DINOv2", "csd": "CSD",
    "effnet": "EffNet",
}  # fmt: skip
SHOWN = {
    "average_score": "S",
    "forgetting": "F",
    "peak": "peak",
    "retention": "retention",
    "worst_task": "worst task",
}


@dataclass
class Page:
    """What the template prints."""

    title: str
    kicker: str
    heading: str
    lead: str
    numbers: list[dict[str, str]] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    sides: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)
    footer: str = ""


def write_report(
    run_dirs: Path | Sequence[Path], scores: Path | None = None, output: Path | None = None
) -> Path:
    """Writes report.html of a run (into its folder), or of several runs side by side.

    Args:
        scores: scores.json of tools/evaluate.py; default: the one in the run's folder.
        output: the file to write; default report.html in the first run's folder.
    Raises:
        DataError: a folder that is no run's.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = [read_run(folder) for folder in folders]
    files = [scores] if scores is not None else [find_scores(folder) for folder in folders]
    page = build_page(runs, [read_scores(file) for file in files])
    return _write_whole(output or folders[0] / "report.html", render_page(page))


def render_page(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = (HERE / "script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("template.html.j2").render(
        page=page,
        style=Markup((HERE / "style.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
    )


def build_page(runs: Sequence[RunFacts], scores: Sequence[Facts]) -> Page:
    """Everything on the page; `scores` are the parsed scores.json files, empty where missing."""
    matrices = [next((m for s in scores if (m := scores_of(s, run))), {}) for run in runs]
    page = Page(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        kicker=f"Continual personalisation · {runs[0].base or 'SDXL'}",
        heading=_heading(runs),
        lead=_lead(runs, matrices),
        runs=[
            _describe_run(run, found, f"run{i}")
            for i, (run, found) in enumerate(zip(runs, matrices, strict=True))
        ],
        footer="Written from the run's own files. Opens without a network; nothing is loaded.",
    )
    metrics = list(dict.fromkeys(name for found in matrices for name in found))
    if len(runs) == 1 and metrics:
        page.numbers = _key_numbers(metrics[0], matrices[0][metrics[0]])
    page.tables = [_score_table(m, runs, matrices, s) for m in metrics for s in scores[:1]]
    page.curves = [_tasks_since_figure(m, runs, matrices) for m in metrics]
    page.differences = _differences(scores)
    if len(runs) > 1:
        page.sides = _final_samples(runs)
    page.sections = _sections(page)
    page.terms = _terms(page)
    return page


# ------------------------------------------------------------------------------ the page's head


def _heading(runs: Sequence[RunFacts]) -> str:
    if len(runs) == 1:
        return runs[0].name
    strategies = list(dict.fromkeys(run.strategy for run in runs))
    return " · ".join(strategies) if len(strategies) > 1 else f"{strategies[0]}, {len(runs)} runs"


def _lead(runs: Sequence[RunFacts], matrices: Sequence[Mapping[str, MetricScores]]) -> str:
    run = runs[0]
    count = len(run.tasks)
    number = WORDS[count] if count < len(WORDS) else str(count)
    noun = "concept" if count == 1 else "concepts"
    text = f"{number.capitalize()} {noun}, learned one after another"
    if len(runs) > 1:
        return f"{text}, in {len(runs)} runs."
    text += f" with {run.strategy}" if run.strategy else ""
    share = _retention(next(iter(matrices[0].values()), None))
    if math.isnan(share):
        return text + "."
    return f"{text}. {share:.0%} of what was learned is still there at the end."


def _retention(found: MetricScores | None) -> float:
    if found is None:
        return math.nan
    return measures.summarise(found.matrix, _mean(found.base)).retention


def _key_numbers(metric: str, found: MetricScores) -> list[dict[str, str]]:
    base = _mean(found.base)
    summary = measures.summarise(found.matrix, base)
    title = TITLES.get(metric, metric)
    numbers = [
        (
            "average score S",
            summary.average_score,
            title if math.isnan(base) else f"{title}; the base has {format_number(base)}",
        ),
        ("forgetting F", summary.forgetting, "best score ever reached, minus the final one"),
        ("peak", summary.peak, "mean best score: S + F"),
        ("retention", summary.retention, "of what was gained over the base"),
    ]
    return [
        {"label": label, "value": format_number(value), "note": note}
        for label, value, note in numbers
        if not math.isnan(value)
    ]


def _sections(page: Page) -> list[tuple[str, str]]:
    first = page.runs[0]
    several = len(page.runs) > 1
    wanted = [
        ("strategies", "Strategies", several and bool(page.tables or page.sides)),
        ("tasks", "Tasks", True),
        ("samples", "Samples", bool(first["stages"])),
        ("memory", "Memory", bool(first["heats"] or first["figures"])),
        ("strategies", "Scores", not several and bool(page.tables)),
        ("training", "Training", bool(first["losses"])),
        ("details", "Details", True),
    ]
    return [(anchor, title) for anchor, title, there in wanted if there]


def _terms(page: Page) -> list[tuple[str, str]]:
    if not page.tables:
        return []
    about = dict(measures.MEASURES)
    terms = [(SHOWN[key], about[key]) for key in SHOWN]
    terms.append(("base", "the published model, before any task"))
    return terms


# ------------------------------------------------------------------------------ scores


def _score_table(
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
            base = _mean(found[metric].base)
            bases.append(base)
            groups.setdefault(run.strategy, []).append(
                measures.summarise(found[metric].matrix, base)
            )
    rows = [Row("base", (measures.spread(bases), *[None] * (len(columns) - 1)), competes=False)]
    for strategy, summaries in groups.items():
        cells = tuple(measures.spread([getattr(s, key) for s in summaries]) for key in SHOWN)
        rows.append(Row(strategy, cells, competes=len(groups) > 1))
    caption = f"{title}, mean ± standard deviation over runs." if len(runs) > 1 else title
    return Table(columns, tuple(rows), corner=title, caption=caption)


def _differences(scores: Sequence[Facts]) -> list[dict[str, Any]]:
    found = [d for s in scores for d in s.get("differences", ()) if d.get("measure") in SHOWN]
    return [
        {
            "measure": f"{TITLES.get(d['metric'], d['metric'])} {SHOWN[d['measure']]}",
            "pair": f"{d['a']} − {d['b']}",
            "difference": _signed(d["difference"]),
            "interval": f"{_signed(d['low'])} to {_signed(d['high'])}",
            "pairs": d["pairs"],
            "clear": d["low"] > 0 or d["high"] < 0,
        }
        for d in found
    ]


def _tasks_since_figure(
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
    caption = (
        f"Figure 1: {title} on the first task while further tasks are learned"
        + ("; the band is one standard deviation over runs" if len(runs) > 1 else "")
        + ". The dotted line is the base model, which never learned it."
    )
    svg = draw_tasks_since(curves, measures.spread(bases), title, f"since-{metric}")
    return {"svg": _markup(svg), "caption": caption}


def _heat(metric: str, found: MetricScores, tasks: Sequence[TaskFacts]) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------ one run


def _describe_run(run: RunFacts, found: Mapping[str, MetricScores], anchor: str) -> dict[str, Any]:
    stages = [{"index": i, "name": _stage_name(i, run.tasks)} for i in sorted(run.samples)]
    return {
        "label": run.label,
        "tasks": [_describe_task(task) for task in run.tasks],
        "stages": stages,
        "rows": _sample_rows(run) if stages else [],
        "heats": [_heat(metric, f, run.tasks) for metric, f in found.items()],
        "figures": _opposition_figures(run, anchor),
        "losses": _loss_figure(run, anchor),
        "options": run.options,
        "lineage": [_describe_link(link) for link in run.lineage],
    }


def _describe_task(task: TaskFacts) -> dict[str, Any]:
    pictures = [embed_picture(p, f"{task.concept}, a training image", 160) for p in task.images[:4]]
    return {
        "index": task.index,
        "concept": task.concept,
        "about": task.about,
        "train_prompt": task.train_prompt,
        "references": [p for p in pictures if p],
    }


def _stage_name(index: int, tasks: Sequence[TaskFacts]) -> str:
    if index == 0:
        return "the base model, before any task"
    task = next((t for t in tasks if t.index == index), None)
    return f"after task {index}" + (f": {task.concept}" if task else "")


def _sample_rows(run: RunFacts) -> list[dict[str, Any]]:
    rows = []
    for task in run.tasks:
        cells = []
        for stage in sorted(run.samples):
            paths = run.samples[stage].get(task.name, ())[:PER_CELL]
            alt = f"{task.concept}, {_stage_name(stage, run.tasks)}"
            pictures = [p for p in (embed_picture(path, alt) for path in paths) if p]
            cells.append({"stage": stage, "pictures": pictures})
        if any(cell["pictures"] for cell in cells):
            rows.append({"index": task.index, "concept": task.concept, "cells": cells})
    return rows


def _final_samples(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Per concept of the first run, the final picture of every strategy."""
    chosen = {run.strategy: run for run in reversed(runs) if run.samples}
    sides = []
    for task in runs[0].tasks:
        columns = []
        for strategy, run in reversed(chosen.items()):
            paths = run.samples[max(run.samples)].get(task.name, ())[:2]
            pictures: list[Embedded] = [
                p for p in (embed_picture(path, task.concept) for path in paths) if p
            ]
            if pictures:
                columns.append({"name": strategy, "pictures": pictures})
        if columns:
            sides.append({"title": f"{task.concept}, at the end", "columns": columns})
    return sides


def _loss_figure(run: RunFacts, anchor: str) -> dict[str, Any] | None:
    losses: dict[str, list[float]] = {}
    for step in run.steps:
        value = step.get("loss")
        if isinstance(value, int | float) and math.isfinite(value):
            losses.setdefault(str(step.get("task", "")), []).append(float(value))
    if not losses:
        return None
    return {
        "svg": _markup(draw_losses(list(losses.items()), f"{anchor}-loss")),
        "caption": "Training loss of every task, with its running mean over 25 steps. The loss "
        "of single steps is mostly the noise level that was drawn.",
    }


def _opposition_figures(run: RunFacts, anchor: str) -> list[dict[str, Any]]:
    """Figure 2, where tools/conflicts.py has left its numbers in the run's folder."""
    found = read_scores(run.folder / "conflicts.json")
    ratios: dict[str, list[float]] = {}
    labels: list[str] = []
    for link in found.get("after", ()):
        labels.append(str(link.get("task", len(labels) + 2)))
        for key, value in link.get("ratios", {}).items():
            ratios.setdefault(str(key), []).append(float(value))
    if not ratios:
        return []
    svg = draw_opposition(ratios, labels, f"{anchor}-opposed")
    caption = (
        "Figure 2: how much of what the first task changed is pulled the other way by later tasks."
    )
    return [{"title": "Opposed parameters", "svg": _markup(svg), "caption": caption}]


def _describe_link(link: Facts) -> dict[str, Any]:
    task = link["task"]
    facts = []
    for key in (
        "strategy",
        "base",
        "parent",
        "hashes",
        "rounding",
        "seconds",
        "created",
        "versions",
    ):
        value = link.get(key)
        if isinstance(value, Mapping):
            facts += [(f"{key}.{k}", str(v)) for k, v in value.items() if v not in (None, [], "")]
        elif value not in (None, ""):
            facts.append((key, str(value)))
    return {"title": f"{int(task['index']):02d} {task['name']}", "facts": facts}


# ------------------------------------------------------------------------------ small things


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _signed(value: float) -> str:
    text = format_number(value)
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _write_whole(path: Path, text: str) -> Path:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


__all__ = ["Page", "Spread", "build_page", "render_page", "write_report"]
