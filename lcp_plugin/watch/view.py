"""The page as it is now: what the run's folder says, as pieces of HTML that the browser puts in.

Everything is read anew at most once in `FRESH` seconds, however many pages are open. Charts cost
the most: they are drawn again only after `SPARED` times as long as drawing them took.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcp_plugin.errors import DataError, RunFolderError
from lcp_plugin.report.blocks import Block, Concepts, Text
from lcp_plugin.report.chapters import Chapter, show_details, show_recognised, show_training
from lcp_plugin.report.material import Material, ScoredRun, gather
from lcp_plugin.report.page import Section, Sheet, say_recognised
from lcp_plugin.report.read import (
    RUN,
    Facts,
    RunFacts,
    find_scores,
    read_run,
    read_scores,
    read_table,
)
from lcp_plugin.report.templates import SCRIPT, STYLE, hash_scripts, open_templates, read_whole
from lcp_plugin.watch.life import WORDS, Life, examine
from lcp_plugin.watch.log import StepLog
from lcp_plugin.watch.pictures import Album, build_gallery, lies_inside
from lcp_plugin.watch.progress import measure
from lcp_plugin.watch.telling import Going, Link, count_numbers, draw_chain, go_on, tell

HERE = Path(__file__).resolve().parent
FRESH = 1.0  # seconds
SPARED, LONGEST = 20.0, 10.0  # times as long, at most seconds
CHAPTERS = {
    chapter.anchor: chapter
    for chapter in (
        Chapter("samples", "Samples", "What it remembers"),
        Chapter("recognised", "Recognised", "What is still recognised"),
        Chapter("training", "Training", "Training"),
        Chapter("tasks", "Tasks", "The tasks, in this order"),
        Chapter("details", "Details", "Details"),
    )
}
READ = ("run.json", "logs/*.jsonl", "*/lineage.json", "*scores.json", "evaluation/scores.json")
GROWING = (
    "The model after each task, row by row; the noise is the same everywhere, so what changes is "
    "what the model knows. A click shows a picture in its own size. A cross: the concept is not "
    "recognised in the images of the evaluation's prompts."
)


@dataclass(frozen=True)
class Head:
    """What stands on top."""

    kicker: str
    heading: str
    life: Life
    lead: str
    numbers: Sequence[Mapping[str, str]]
    chain: Sequence[Link]
    going: Going | None

    @property
    def word(self) -> str:
        """The run's state in a word or two."""
        return WORDS[self.life.state].capitalize()


class View:
    """One run, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.album = Album(self.folder)
        self._log = StepLog(self.folder / "logs" / "steps.jsonl")
        self._lock = threading.Lock()  # matplotlib's settings are the process's
        self._parts: dict[str, Any] = {}
        self._looked = -FRESH
        self._charts: tuple[int, str] = (0, "")  # steps in it, HTML
        self._draw_again = 0.0
        self._templates = open_templates(HERE)
        self._script = [read_whole(SCRIPT), read_whole(HERE / "live.js")]

    @property
    def policy(self) -> str:
        """The page's content security policy."""
        return (
            "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
            f"script-src {hash_scripts(self._script)}; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )

    def write_page(self) -> str:
        """The whole page."""
        from markupsafe import Markup

        parts = {k: Markup(v) if k != "title" else v for k, v in self.look().items()}
        return self._templates.get_template("page.html.j2").render(
            parts=parts, style=read_whole(STYLE, HERE / "live.css"), scripts=self._script
        )

    def look(self) -> dict[str, Any]:
        """Title, whether the run goes on, and the pieces of HTML by the name of their place.

        Raises:
            DataError: a file of the run is a link that leads out of its folder.
        """
        with self._lock:
            if time.monotonic() - self._looked >= FRESH:
                self._parts = self._read()
                self._looked = time.monotonic()
            return self._parts

    def _read(self) -> dict[str, Any]:
        check_links(self.folder)
        facts = read_table(self.folder / "run.json", RUN)
        self._log.follow()
        life = examine(self.folder, facts, self._log.last)
        run = replace(read_begun(self.folder), steps=self._log.ordered())
        self.album.list_samples(run)
        scores = read_scores(find_scores(self.folder))
        material = gather([run], [scores])
        one = material.runs[0]
        head = self._head(life, one, facts)
        pieces = {
            "samples": self._write_samples(one),
            "recognised": self._write("recognised", show_recognised(material, one)),
            "training": self._draw_charts(material, life),
            "tasks": self._write("tasks", show_tasks(one.run)),
            "details": self._write("details", show_details(material, one)),
        }
        links = [(name, CHAPTERS[name].title) for name, piece in pieces.items() if piece]
        return {
            "title": f"{_short(head)} · {head.heading}",
            "goes_on": life.goes_on,
            "head": self._render("parts.html.j2", "head", head),
            "links": self._render("parts.html.j2", "links", links),
            **pieces,
        }

    def _head(self, life: Life, one: ScoredRun, facts: Facts) -> Head:
        run = one.run
        at = measure(run, facts, self._log.latest, self._log.last)
        lead = tell(life, run, at)
        if one.recognition is not None and life.state == "finished":
            lead += f" {say_recognised(one.recognition, run)}"
        return Head(
            kicker=f"Continual personalisation · {run.base or 'SDXL'}",
            heading=run.name,
            life=life,
            lead=lead,
            numbers=count_numbers(life, at, one),
            chain=draw_chain(run, at, life),
            going=go_on(run, facts) if life.is_broken_off else None,
        )

    def _write_samples(self, one: ScoredRun) -> str:
        gallery = build_gallery(one.run, self.album, one.looks)
        return self._write("samples", [Text(GROWING), gallery] if gallery is not None else [])

    def _write(self, anchor: str, blocks: Sequence[Block]) -> str:
        """A chapter; empty without a block."""
        sheet = Sheet([Section(CHAPTERS[anchor], anchor, blocks)] if blocks else [])
        return self._render("blocks.html.j2", "sections", sheet)

    def _render(self, template: str, macro: str, value: object) -> str:
        """A piece of the page."""
        module = self._templates.get_template(template).make_module()
        return str(getattr(module, macro)(value))

    def _draw_charts(self, material: Material, life: Life) -> str:
        """The curves, unless they were drawn just now or nothing is new."""
        count = len(material.runs[0].run.steps)
        began = time.monotonic()
        early = began < self._draw_again and life.goes_on
        if count != self._charts[0] and not early:
            blocks = show_training(material, material.runs[0])
            self._charts = count, self._write("training", blocks)
            now = time.monotonic()
            self._draw_again = now + min(LONGEST, SPARED * (now - began))
        return self._charts[1]


def read_begun(folder: Path) -> RunFacts:
    """The run's facts; of one that has written nothing yet, its name."""
    try:
        return read_run(folder, is_watched=True)
    except DataError:
        return RunFacts(folder, folder.name, "", (), "", None, None, (), (), (), ())


def check_links(folder: Path) -> None:
    """Raises DataError for a file that the page is made of and that lies outside the folder."""
    for path in (path for pattern in READ for path in folder.glob(pattern)):
        if path.exists() and not lies_inside(folder, path):
            raise RunFolderError(
                f"{path} is a link that leads out of the run's folder; what lies there is not "
                "shown. Put the file itself in its place."
            )


def show_tasks(run: RunFacts) -> list[Block]:
    """The tasks as the report tells them, without their photos, which lie elsewhere."""
    concepts = [
        {
            "index": task.index,
            "concept": task.concept,
            "about": task.about,
            "train_prompt": task.train_prompt,
            "references": (),
        }
        for task in run.tasks
    ]
    return [Concepts(concepts)] if concepts else []


def _short(head: Head) -> str:
    """`task 2 of 4, step 37`, for a tab; the state where none is under way."""
    if head.life.state != "running":
        return head.word
    return ", ".join(f"{n['label']} {n['value']}" for n in head.numbers[:2]) or head.word
