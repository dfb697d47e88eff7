"""One run as the page tells it: what was learned, samples by stage, losses, Figure 2, lineage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcp_plugin.report.figures import as_markup, draw_losses, draw_opposition
from lcp_plugin.report.inline import Embedded, embed_picture
from lcp_plugin.report.numbers import describe_heat_map
from lcp_plugin.report.read import Facts, MetricScores, RunFacts, TaskFacts, read_scores

PER_CELL = 6  # pictures of one concept at one stage, over all runs of the page


def describe_run(
    run: RunFacts, found: Mapping[str, MetricScores], anchor: str, runs: int = 1
) -> dict[str, Any]:
    """Everything of one run; `anchor` begins the ids of its charts, `runs` stand on the page."""
    stages = [{"index": i, "name": _stage_name(i, run)} for i in sorted(run.samples)]
    return {
        "label": run.label,
        "tasks": [_describe_task(task) for task in run.tasks],
        "stages": stages,
        "rows": _sample_rows(run, max(1, PER_CELL // runs)) if stages else [],
        "heats": [describe_heat_map(metric, f, run.tasks) for metric, f in found.items()],
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


def _stage_name(index: int, run: RunFacts) -> str:
    if index == 0:
        return "the base model, before any task"
    task = next((t for t in run.tasks if t.index == index), None)
    name = f"after task {index}" + (f": {task.concept}" if task else "")
    return f"the start of this run, {name}" if index == run.start else name


def _sample_rows(run: RunFacts, per_cell: int) -> list[dict[str, Any]]:
    rows = []
    for task in run.tasks:
        cells = []
        for stage in sorted(run.samples):
            paths = run.samples[stage].get(task.name, ())[:per_cell]
            alt = f"{task.concept}, {_stage_name(stage, run)}"
            pictures = [p for p in (embed_picture(path, alt) for path in paths) if p]
            cells.append({"stage": stage, "pictures": pictures})
        if any(cell["pictures"] for cell in cells):
            rows.append({"index": task.index, "concept": task.concept, "cells": cells})
    return rows


def collect_final_samples(runs: Sequence[RunFacts]) -> dict[str, Any] | None:
    """Per concept of the first run, the final pictures of every strategy beside a photo of it."""
    chosen = {run.strategy: run for run in reversed(runs) if run.samples}
    columns = list(reversed(chosen))
    rows = []
    for task in runs[0].tasks:
        cells = [_final_cell(chosen[strategy], task) for strategy in columns]
        photos = [embed_picture(p, f"{task.concept}, a training image") for p in task.images[:1]]
        if any(cells):
            rows.append(
                {"concept": task.concept, "photo": next(iter(photos), None), "cells": cells}
            )
    return {"columns": columns, "rows": rows} if rows else None


def _final_cell(run: RunFacts, task: TaskFacts) -> list[Embedded]:
    paths = run.samples[max(run.samples)].get(task.name, ())[:2]
    return [p for p in (embed_picture(path, task.concept) for path in paths) if p]


def _loss_figure(run: RunFacts, anchor: str) -> dict[str, Any] | None:
    losses: dict[str, list[float]] = {}
    for step in run.steps:
        value = step.get("loss")
        if isinstance(value, int | float) and math.isfinite(value):
            losses.setdefault(str(step.get("task", "")), []).append(float(value))
    if not losses:
        return None
    return {
        "svg": as_markup(draw_losses(list(losses.items()), f"{anchor}-loss")),
        "caption": "Training loss of every task, with its running mean over 25 steps. The loss "
        "of single steps is mostly the noise level that was drawn.",
    }


READINGS = {"since": "since before it (W_j − W_i−1)", "after": "by later tasks (W_j − W_i)"}


def _opposition_figures(run: RunFacts, anchor: str) -> list[dict[str, Any]]:
    """Figure 2, where tools/conflicts.py has left its numbers in the run's folder."""
    links = read_scores(run.folder / "conflicts.json").get("after", ())
    ratios: dict[str, list[float]] = {}
    for link in links:
        for key, value in link.get("ratios", {}).items():
            ratios.setdefault(READINGS.get(key, key), []).append(float(value))
    if not ratios:
        return []
    labels = [str(link.get("task", "")) for link in links]
    last = links[-1]
    shares = [
        f"{READINGS.get(key, key)}: {last.get('opposed', {}).get(key, 0.0):.0%} of the entries "
        f"oppose and {last.get('zeros', {}).get(key, 0.0):.0%} are exactly zero"
        for key in last.get("ratios", {})
    ]
    caption = (
        "Figure 2: how strongly what the first task changed is pulled the other way, "
        "||b · [sign a ≠ sign b]|| / ||a||. At the end, " + "; ".join(shares) + "."
    )
    svg = draw_opposition(ratios, labels, f"{anchor}-opposed")
    return [{"title": "Opposed parameters", "svg": as_markup(svg), "caption": caption}]


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
