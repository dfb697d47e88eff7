"""The page's chapters, in their order: one table, `CHAPTERS`, and what each of them says.

A chapter is a function from what is known to blocks; without any it is left out. A further one is a
function and a row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.metric_table import title_of
from lcp_plugin.evaluation.recognition import RULE, Look
from lcp_plugin.formats.shapes import Maybe
from lcp_plugin.report.blocks import (
    Block,
    Cell,
    Concepts,
    Figure,
    Figures,
    Folded,
    Gallery,
    Map,
    Maps,
    Rows,
    Scores,
    Slider,
    Subtitle,
    Text,
    Words,
)
from lcp_plugin.report.figures import as_markup, draw_losses, draw_opposition
from lcp_plugin.report.inline import Embedded, embed_picture
from lcp_plugin.report.material import Material, ScoredRun
from lcp_plugin.report.numbers import (
    SHOWN,
    build_score_table,
    describe_differences,
    describe_extras,
    draw_figure_one,
    draw_score_map,
)
from lcp_plugin.report.read import (
    Facts,
    RunFacts,
    TaskFacts,
    read_table,
)
from lcp_plugin.telling.wording import counted, quote

PER_CELL = 6  # pictures of one concept at one stage, over all runs of the page


def show_strategies(material: Material) -> list[Block]:
    """Tables, differences, Figure 1 and final pictures of several runs."""
    return [*_score_blocks(material), *_side_by_side(material)] if material.is_comparison else []


def show_concepts(material: Material, one: ScoredRun) -> list[Block]:
    """The tasks in order."""
    return [Concepts([_describe_concept(task) for task in one.run.tasks])]


def show_recognised(material: Material, one: ScoredRun) -> list[Block]:
    """What is recognised after each task, and what the rest turned into."""
    found, tasks = one.recognition, one.run.tasks
    if found is None or not one.looks:
        return []
    states = [f"after {stage.partition('_')[0].lstrip('0')}" for stage in one.looks]
    concepts = {task.name: task.concept for task in tasks}
    base = dict(zip(found.tasks, found.base, strict=True))
    rows = [
        (
            concepts.get(name, name),
            [
                Cell(f"{base[name].share:.0%}", _shade(base[name].share)),
                *(_look_cell(looks.get(name)) for looks in one.looks.values()),
            ],
        )
        for name in found.tasks
    ]
    caption = (
        "Rows are concepts, columns the model after each task: the share of a concept's images "
        "that are nearest to its own pictures. ✕: not recognised, nearest to that task's concept."
    )
    rule = (
        f"{RULE}; judged by {title_of(found.metric)} on {counted(found.images, 'image')} of each "
        "concept after every task."
    )
    return [
        Text(rule),
        Maps([Map("Images recognised, state by state", ["base", *states], rows, caption)]),
    ]


def show_samples(material: Material, one: ScoredRun) -> list[Block]:
    """The samples of every stage behind a slider; what is not recognised is marked."""
    run = one.run
    if not run.samples:
        return []
    per_cell = max(1, PER_CELL // len(material.runs))
    stages = [{"index": i, "name": _stage_name(i, run)} for i in sorted(run.samples)]
    about = (
        "Each row is a concept, each position of the slider a state of the model: "
        + ("the base first, then " if stages[0]["index"] == 0 else "")
        + "after every task. The noise is the same everywhere, so what changes is what the model "
        "knows. Drag, or use the arrow keys."
    )
    how = ""
    if one.looks:
        how = (
            " ✕ marks a concept that is not recognised in the images of the evaluation's prompts, "
            "here and in samples/grid.png."
        )
    elif len(run.tasks) > 1:  # one alone cannot be mistaken for another
        folder = quote(str(run.folder))
        how = (
            " To mark what is no longer recognised, here and in samples/grid.png, score the run: "
            f"lcp evaluate {folder}, then lcp report {folder}; with "
            'evaluate = ["effnet"] in its config a run does so at its end.'
        )
    return [Text(about + how), Slider(one.number, stages, _sample_rows(one, per_cell))]


def show_memory(material: Material, one: ScoredRun) -> list[Block]:
    """Matrices of scores, and Figure 2."""
    maps = [draw_score_map(name, found, one.run.tasks) for name, found in one.matrices.items()]
    figures = _opposition_figures(one.run, f"run{one.number}")
    return [*([Maps(maps)] if maps else []), *([Figures(figures)] if figures else [])]


def show_scores(material: Material, one: ScoredRun) -> list[Block]:
    """The same numbers as of a comparison, of a single run."""
    return [] if material.is_comparison else _score_blocks(material)


def show_training(material: Material, one: ScoredRun) -> list[Block]:
    """The loss, and that of what is rehearsed."""
    figures = [
        figure
        for key, (what, caption) in LOSSES.items()
        if (figure := _loss_figure(one, key, what, caption)) is not None
    ]
    return [Figures(figures)] if figures else []


def show_details(material: Material, one: ScoredRun) -> list[Block]:
    """Options and lineage, folded away."""
    links = [(_link_title(link), _link_facts(link)) for link in one.run.lineage]
    options = Folded(f"Options ({len(one.run.options)})", [("", one.run.options)])
    return [options, *([Folded("Lineage", links)] if links else [])]


def show_extras(material: Material) -> list[Block]:
    """Every measure of --extras: its sentence, and a table over the runs or a map."""
    blocks: list[Block] = []
    for found in describe_extras(material.scores, [one.run for one in material.runs]):
        rows = [[row["name"], *(value for _, value in row["numbers"])] for row in found["rows"]]
        blocks += [Subtitle(found["title"]), Text(found["about"])]
        blocks.append(Rows(found["title"], ["run", *found["columns"]], rows))
        blocks += [Maps(found["maps"])] if found["maps"] else []
    return blocks


def explain_words(material: Material) -> list[Block]:
    """What the columns of the tables mean."""
    if not material.metrics:
        return []
    terms = [(SHOWN[key], measures.MEASURES[key]) for key in SHOWN]
    if any(one.recognition for one in material.runs):
        terms.insert(0, ("recognised", RULE))
    return [Words([*terms, ("base", "the published model, before any task")])]


@dataclass(frozen=True)
class Chapter:
    """A section of the page; one of them for each run where `write` takes a run."""

    anchor: str
    title: str  # in the list of sections; empty: it is not listed
    heading: str
    write: Callable[[Material], list[Block]] | None = None
    write_run: Callable[[Material, ScoredRun], list[Block]] | None = None


CHAPTERS = (
    Chapter("strategies", "Strategies", "Strategies side by side", show_strategies),
    Chapter("recognised", "Recognised", "What is still recognised", None, show_recognised),
    Chapter("tasks", "Tasks", "What was learned, in this order", None, show_concepts),
    Chapter("samples", "Samples", "What it remembers", None, show_samples),
    Chapter("memory", "Memory", "Memory, in numbers", None, show_memory),
    Chapter("scores", "Scores", "Scores", None, show_scores),
    Chapter("training", "Training", "Training", None, show_training),
    Chapter("details", "Details", "Details", None, show_details),
    Chapter("extras", "More measures", "More measures", show_extras),
    Chapter("terms", "", "What the words mean", explain_words),
)


# ------------------------------------------------------------------------------ scores


def _score_blocks(material: Material) -> list[Block]:
    blocks: list[Block] = []
    for metric in material.metrics:
        table = build_score_table(metric, material)
        blocks.append(Scores(table))
        blocks += [Text(table.caption)] if table.caption != table.corner else []
    differences = describe_differences(material.scores)
    if differences:
        keys = ("measure", "pair", "difference", "interval", "pairs")
        rows = [[str(d[key]) for key in keys] for d in differences]
        strong = frozenset((at, 2) for at, d in enumerate(differences) if d["certain"])
        columns = ["measure", "strategies", "difference", "95% interval", "pairs"]
        blocks += [
            Subtitle("Differences between strategies"),
            Rows("Differences", columns, rows, strong),
            Text(
                "Runs with the same order of tasks and the same seed are compared as pairs and "
                "resampled as pairs. Bold where the interval leaves zero out."
            ),
        ]
    curves = [draw_figure_one(metric, material) for metric in material.metrics]
    return [*blocks, *([Figures(curves)] if curves else [])]


def _side_by_side(material: Material) -> list[Block]:
    """Per concept of the first run, the final pictures of every strategy beside a photo of it."""
    chosen = {one.run.strategy: one for one in reversed(material.runs) if one.run.samples}
    columns = list(reversed(chosen))
    rows = []
    for task in material.runs[0].run.tasks:
        cells = [_final_cell(chosen[strategy], task) for strategy in columns]
        photos = [embed_picture(p, f"{task.concept}, a training image") for p in task.images[:1]]
        if any(pictures for pictures, _ in cells):
            rows.append((task.concept, [([p for p in photos if p], ""), *cells]))
    return [Subtitle("At the end"), Gallery(["photo", *columns], rows)] if rows else []


def _final_cell(one: ScoredRun, task: TaskFacts) -> tuple[list[Embedded], str]:
    paths = one.run.samples[max(one.run.samples)].get(task.name, ())[:2]
    pictures = [p for p in (embed_picture(path, task.concept) for path in paths) if p]
    look = one.recognition.lost.get(task.name) if one.recognition else None
    return pictures, _say_lost(look, one.run)


# ------------------------------------------------------------------------------ recognition


def _look_cell(look: Look | None) -> Cell:
    if look is None:
        return Cell()
    if look.is_recognised:
        return Cell(f"{look.share:.0%}", _shade(look.share))
    return Cell(f"✕ {look.other or 'none'}", _shade(look.share), lost=True)


def _shade(share: float) -> int:
    return round(6 + 84 * share)


def _say_lost(look: Look | None, run: RunFacts) -> str:
    """`no longer recognised: nearest to uwu boat`; empty for what is, and for what has no score."""
    if look is None or look.is_recognised:
        return ""
    concepts = {task.name: task.concept for task in run.tasks}
    return f"no longer recognised: nearest to {concepts.get(look.other or '', look.other)}"


# ------------------------------------------------------------------------------ samples


def _describe_concept(task: TaskFacts) -> dict[str, Any]:
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


def _sample_rows(one: ScoredRun, per_cell: int) -> list[dict[str, Any]]:
    run = one.run
    by_index = {stage.partition("_")[0]: looks for stage, looks in one.looks.items()}
    rows = []
    for task in run.tasks:
        cells = []
        for stage in sorted(run.samples):
            paths = run.samples[stage].get(task.name, ())[:per_cell]
            alt = f"{task.concept}, {_stage_name(stage, run)}"
            pictures = [p for p in (embed_picture(path, alt) for path in paths) if p]
            look = by_index.get(f"{stage:02d}", {}).get(task.name)
            lost = _say_lost(look, run) if stage > task.index else ""
            cells.append({"stage": stage, "pictures": pictures, "lost": lost})
        if any(cell["pictures"] for cell in cells):
            rows.append({"index": task.index, "concept": task.concept, "cells": cells})
    return rows


# ------------------------------------------------------------------------------ training


LOSSES = {  # in a line of the log -> what it is called, and what it tells
    "loss": (
        "loss",
        "Training loss of every task, with its running mean over 25 steps. The loss of single "
        "steps is mostly the noise level that was drawn.",
    ),
    "rehearsal": (
        "rehearsal loss",
        "Loss on what is rehearsed of earlier tasks, with its running mean over 25 steps: while it "
        "stays low, they are still there.",
    ),
}


def _loss_figure(one: ScoredRun, key: str, what: str, caption: str) -> Figure | None:
    losses: dict[str, list[float]] = {}
    for step in one.run.steps:
        mine = losses.setdefault(str(step.get("task", "")), [])
        value = step.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            mine.append(float(value))
    if not any(losses.values()):
        return None
    svg = draw_losses(list(losses.items()), f"run{one.number}-{key}", what)
    return Figure(as_markup(svg), caption)


READING_TITLES = {"since": "since before it (W_j − W_i−1)", "after": "by later tasks (W_j − W_i)"}


_SHARES = {str: float}
CONFLICTS = {  # what a page needs of conflicts.json
    "after": Maybe(
        [{"task": str, "ratios": _SHARES, "opposed": Maybe(_SHARES), "zeros": Maybe(_SHARES)}]
    )
}


def _opposition_figures(run: RunFacts, anchor: str) -> list[Figure]:
    """Figure 2, where `lcp conflicts` has left its numbers in the run's folder."""
    links = read_table(run.folder / "conflicts.json", CONFLICTS).get("after", ())
    ratios: dict[str, list[float]] = {}
    for link in links:
        for key, value in link.get("ratios", {}).items():
            ratios.setdefault(READING_TITLES.get(key, key), []).append(float(value))
    if not ratios:
        return []
    labels = [str(link.get("task", "")) for link in links]
    last = links[-1]
    shares = [
        f"{READING_TITLES.get(key, key)}: {last.get('opposed', {}).get(key, 0.0):.0%} of the "
        f"entries oppose and {last.get('zeros', {}).get(key, 0.0):.0%} are exactly zero"
        for key in last.get("ratios", {})
    ]
    caption = (
        "Figure 2: how strongly what the first task changed is pulled the other way, "
        "||b · [sign a ≠ sign b]|| / ||a||. At the end, " + "; ".join(shares) + "."
    )
    svg = draw_opposition(ratios, labels, f"{anchor}-opposed")
    return [Figure(as_markup(svg), caption, "Opposed parameters")]


# ------------------------------------------------------------------------------ lineage

TOLD = ("strategy", "base", "parent", "hashes", "rounding", "seconds", "created", "versions")


def _link_title(link: Facts) -> str:
    return f"{int(link['task']['index']):02d} {link['task']['name']}"


def _link_facts(link: Facts) -> Sequence[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key in TOLD:
        value = link.get(key)
        if isinstance(value, Mapping):
            facts += [(f"{key}.{k}", str(v)) for k, v in value.items() if v not in (None, [], "")]
        elif value not in (None, ""):
            facts.append((key, str(value)))
    return facts
