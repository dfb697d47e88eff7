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

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.tables import Table, format_number
from lcp_plugin.report.chapters import collect_final_samples, describe_run
from lcp_plugin.report.numbers import (
    SHOWN,
    TITLES,
    build_score_table,
    describe_differences,
    describe_extras,
    draw_figure_one,
    mean_of,
)
from lcp_plugin.report.read import (
    Facts,
    MetricScores,
    RunFacts,
    find_scores,
    read_run,
    read_scores,
    scores_of,
)

HERE = Path(__file__).resolve().parent
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


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
    sides: dict[str, Any] | None = None
    extras: list[dict[str, Any]] = field(default_factory=list)
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
            describe_run(run, found, f"run{i}", len(runs))
            for i, (run, found) in enumerate(zip(runs, matrices, strict=True))
        ],
        footer="Written from the run's own files. Opens without a network; nothing is loaded.",
    )
    metrics = list(dict.fromkeys(name for found in matrices for name in found))
    if len(runs) == 1 and metrics:
        page.numbers = _key_numbers(metrics[0], matrices[0][metrics[0]])
    page.tables = [build_score_table(m, runs, matrices, s) for m in metrics for s in scores[:1]]
    page.curves = [draw_figure_one(m, runs, matrices) for m in metrics]
    page.differences = describe_differences(scores)
    if len(runs) > 1:
        page.sides = collect_final_samples(runs)
    page.extras = describe_extras(scores, runs)
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
    return measures.summarise(found.matrix, mean_of(found.base)).retention


def _key_numbers(metric: str, found: MetricScores) -> list[dict[str, str]]:
    base = mean_of(found.base)
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
        ("extras", "More measures", bool(page.extras)),
    ]
    return [(anchor, title) for anchor, title, there in wanted if there]


def _terms(page: Page) -> list[tuple[str, str]]:
    if not page.tables:
        return []
    about = dict(measures.MEASURES)
    terms = [(SHOWN[key], about[key]) for key in SHOWN]
    terms.append(("base", "the published model, before any task"))
    return terms


def _write_whole(path: Path, text: str) -> Path:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
