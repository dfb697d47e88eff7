"""A run, or several side by side, as one page: its head, and the chapters that `chapters` writes.

A content security policy in the page forbids every request and every script but ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.metric_table import title_of
from lcp_plugin.evaluation.recognition import Recognition, tell_losses
from lcp_plugin.evaluation.tables import format_number
from lcp_plugin.formats.disk import write_bytes
from lcp_plugin.report.blocks import Block
from lcp_plugin.report.chapters import CHAPTERS, Chapter
from lcp_plugin.report.material import Material, MetricScores, ScoredRun, gather
from lcp_plugin.report.numbers import mean_of
from lcp_plugin.report.read import (
    Facts,
    RunFacts,
    find_scores,
    read_named_scores,
    read_run,
    read_scores,
)
from lcp_plugin.report.templates import SCRIPT, STYLE, hash_scripts, open_templates, read_whole
from lcp_plugin.telling.wording import agree, counted, in_words, join_names


@dataclass(frozen=True)
class Section:
    """A chapter as written; `anchor` is empty where another run's section has it."""

    chapter: Chapter
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Sheet:
    """Sections of the page, or of one run on it (`label`, `number` from 0)."""

    sections: Sequence[Section]
    label: str = ""
    number: int | None = None


@dataclass(frozen=True)
class Page:
    """What the template prints."""

    title: str
    kicker: str
    heading: str
    lead: str
    numbers: Sequence[dict[str, str]]
    sheets: Sequence[Sheet]
    runs: Sequence[str]  # labels
    footer: str = "Written from the run's own files. Opens without a network; nothing is loaded."

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchors and titles of the list on top."""
        found = [s for sheet in self.sheets for s in sheet.sections]
        return [(s.anchor, s.chapter.title) for s in found if s.anchor and s.chapter.title]


def write_report(
    run_dirs: Path | Sequence[Path], scores: Path | None = None, output: Path | None = None
) -> Path:
    """Writes report.html of a run (into its folder), or of several runs side by side.

    Args:
        scores: scores.json of `lcp evaluate`; default: the one in the run's folder.
        output: the file to write; default report.html in the first run's folder.
    Raises:
        DataError: a folder that is no run's.  FileFormatError: a file that holds no scores.
        DiskError: the page cannot be written.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = [read_run(folder) for folder in folders]
    if scores is not None:
        found = [read_named_scores(scores)]
    else:
        found = [read_scores(find_scores(folder)) for folder in folders]
    page = build_page(runs, found)
    path = output or folders[0] / "report.html"
    write_bytes(path, render_page(page).encode("utf-8"))
    return path


def render_page(page: Page) -> str:
    """The page as HTML."""
    script = read_whole(SCRIPT)
    return (
        open_templates()
        .get_template("template.html.j2")
        .render(
            page=page,
            style=read_whole(STYLE),
            scripts=[script],
            script_hashes=hash_scripts([script]),
        )
    )


def build_page(runs: Sequence[RunFacts], scores: Sequence[Facts]) -> Page:
    """Everything on the page; `scores` are the parsed scores.json files, empty where missing."""
    material = gather(runs, scores)
    return Page(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        kicker=f"Continual personalisation · {runs[0].base or 'SDXL'}",
        heading=_heading(runs),
        lead=write_lead(material),
        numbers=_compared_numbers(material) if len(runs) > 1 else _key_numbers(material.runs[0]),
        sheets=_write_sheets(material),
        runs=[run.label for run in runs],
    )


def _write_sheets(material: Material) -> list[Sheet]:
    """The chapters in order; those that are about a run follow each other, run by run."""
    first_of_run = next(at for at, chapter in enumerate(CHAPTERS) if chapter.write_run)
    before = [c for c in CHAPTERS[:first_of_run] if c.write]
    after = [c for c in CHAPTERS[first_of_run:] if c.write]
    sheets = [Sheet(_write_page_chapters(before, material))]
    for one in material.runs:
        written = [(c, c.write_run(material, one)) for c in CHAPTERS if c.write_run]
        sections = [
            Section(chapter, "" if one.number else chapter.anchor, blocks)
            for chapter, blocks in written
            if blocks
        ]
        sheets.append(Sheet(sections, one.run.label if material.is_comparison else "", one.number))
    return [*sheets, Sheet(_write_page_chapters(after, material))]


def _write_page_chapters(chapters: Sequence[Chapter], material: Material) -> list[Section]:
    written = [(chapter, chapter.write(material)) for chapter in chapters if chapter.write]
    return [Section(chapter, chapter.anchor, blocks) for chapter, blocks in written if blocks]


# ------------------------------------------------------------------------------ the page's head


def _heading(runs: Sequence[RunFacts]) -> str:
    if len(runs) == 1:
        return runs[0].name
    strategies = list(dict.fromkeys(run.strategy for run in runs))
    return (
        " · ".join(strategies)
        if len(strategies) > 1
        else f"{strategies[0]}, {counted(len(runs), 'run')}"
    )


def write_lead(material: Material) -> str:
    """What the eye sees first: which concepts are still recognised; then how they were learned."""
    first, count = material.runs[0], len(material.runs[0].run.tasks)
    how = f" with {first.run.strategy}" if first.run.strategy else ""
    seen = say_recognised(first.recognition, first.run) if first.recognition else ""
    if material.is_comparison:
        how, seen = f", in {len(material.runs)} runs", _say_compared(material)
    if seen:
        return f"{seen} Learned one after another{how}."
    return (
        f"{in_words(count).capitalize()} {agree(count, 'concept')}, learned one after another{how}."
    )


def say_recognised(found: Recognition, run: RunFacts) -> str:
    """`Two of four concepts are still recognised at the end: ...`, and what the others became."""
    concepts = {task.name: task.concept for task in run.tasks}
    kept, count = [concepts.get(name, name) for name in found.kept], len(found.tasks)
    if len(kept) == count:
        text = f"All {in_words(count)} concepts are still recognised at the end."
    elif kept:
        number = in_words(len(kept)).capitalize()
        verb = agree(len(kept), "is", "are")
        text = f"{number} of {in_words(count)} concepts {verb} still recognised at the end: "
        text += f"{join_names(kept)}."
    else:
        text = f"None of the {in_words(count)} concepts is still recognised at the end."
    losses = "; ".join(tell_losses(found, concepts))
    return f"{text} {losses}." if losses else text


def _say_compared(material: Material) -> str:
    means = _kept_by_strategy(material)
    if not means:
        return ""
    told = ", ".join(f"{strategy} {mean:.3g}" for strategy, (mean, _) in means.items())
    count = in_words(len(material.runs[0].run.tasks))
    return f"Still recognised at the end, of {count} concepts: {told}."


def _kept_by_strategy(material: Material) -> dict[str, tuple[float, int]]:
    """Strategy -> how many concepts its runs still recognise in the mean, and of how many runs."""
    groups: dict[str, list[float]] = {}
    for one in material.runs:
        if one.recognition is not None:
            groups.setdefault(one.run.strategy, []).append(float(len(one.recognition.kept)))
    return {name: (mean_of(kept), len(kept)) for name, kept in groups.items()}


def _compared_numbers(material: Material) -> list[dict[str, str]]:
    count = len(material.runs[0].run.tasks)
    return [
        {
            "label": strategy,
            "value": f"{mean:.3g} of {count}",
            "note": "concepts still recognised" + (f", mean of {runs} runs" if runs > 1 else ""),
        }
        for strategy, (mean, runs) in _kept_by_strategy(material).items()
    ]


def _key_numbers(one: ScoredRun) -> list[dict[str, str]]:
    """The figures under the lead: recognition first, then the paper's."""
    told = []
    if one.recognition is not None:
        found = one.recognition
        note = (
            f"concepts, at the end; {title_of(found.metric)}, {counted(found.images, 'image')} each"
        )
        value = f"{len(found.kept)} of {len(found.tasks)}"
        told.append({"label": "still recognised", "value": value, "note": note})
    for metric, scores in list(one.matrices.items())[:1]:
        told += _score_numbers(metric, scores)
    return told


def _score_numbers(metric: str, found: MetricScores) -> list[dict[str, str]]:
    base = mean_of(found.base)
    numbers = measures.score_matrix(found.matrix, base)
    title = title_of(metric)
    of_base = title if math.isnan(base) else f"{title}; the base has {format_number(base)}"
    shown = [
        ("average score S", numbers.average_score, of_base),
        ("forgetting F", numbers.forgetting, "best score ever reached, minus the final one"),
        ("peak", numbers.peak, "mean best score: S + F"),
        ("retention", numbers.retention, "of the score gained over the base, not of the concepts"),
    ]
    return [
        {"label": label, "value": format_number(value), "note": note}
        for label, value, note in shown
        if not math.isnan(value)
    ]
