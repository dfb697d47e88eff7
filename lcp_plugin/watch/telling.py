"""What the head of the page says: the run's state in words, its numbers, the command to go on."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.report.material import ScoredRun
from lcp_plugin.report.read import Facts, RunFacts
from lcp_plugin.telling.time_left import TimeLeft
from lcp_plugin.telling.wording import say_duration, say_moment
from lcp_plugin.watch.life import Life
from lcp_plugin.watch.progress import Progress

STATE = re.compile(r"(\d+)_.+_step(\d+)")  # folder of a saved state


@dataclass(frozen=True)
class Link:
    """One task of the chain, as the bar on top shows it."""

    name: str
    state: str  # done, now, next
    percent: int


@dataclass(frozen=True)
class Going:
    """How to go on with a run that was broken off."""

    where: str  # it would go on from
    line: str  # the command; empty where none is recorded
    folder: str  # to give it in; empty where that is here


def tell(life: Life, run: RunFacts, at: Progress | None) -> str:
    """A sentence or two: the lead of the page."""
    if life.state == "starting":
        return "It is getting ready: the model is loaded and the images are read."
    if life.state == "running":
        return _tell_running(run, at)
    if not life.is_broken_off:
        count = len(own_tasks(run))
        told = f"All {count} tasks are learned." if count > 1 else "The task is learned."
        return told + (" Scores and report are being made." if life.goes_on else "")
    stood = f" It stood at {_where(run, at)}, step {at.step:,} of {at.total:,}." if at else ""
    if life.state == "stopped":
        return f"It was stopped, and what it had learned is saved.{stood}"
    if life.state == "failed":
        return f"It ended by an error.{stood}"
    return f"It has died without a word: killed, or its machine went down.{stood}"


def _tell_running(run: RunFacts, at: Progress | None) -> str:
    if at is None:
        return "It has begun; no step is done yet."
    where = _where(run, at)
    if at.step < at.total:
        return f"Learning {where}: step {at.step:,} of {at.total:,}."
    if not at.is_over:
        return f"T{where[1:]}, is trained; its weights are saved and samples drawn."
    if at.position < at.tasks:
        return f"Task {at.position + 1} of {at.tasks} is being prepared."
    return f"T{where[1:]}, is done; it was the last."


def _where(run: RunFacts, at: Progress) -> str:
    """`task 2 of 4, zwz vase`."""
    concepts = {task.name: task.concept for task in run.tasks}
    return f"task {at.position} of {at.tasks}, {concepts.get(at.task, at.task)}"


def own_tasks(run: RunFacts) -> list[str]:
    """Names of the tasks that are this run's own, not its parent's."""
    return [task.name for task in run.tasks if task.index > run.start]


def draw_chain(run: RunFacts, at: Progress | None, life: Life) -> list[Link]:
    """Every task of the run: learned, in training, to come."""
    done = {link["task"]["name"] for link in run.lineage}
    links = []
    for task in run.tasks:
        if task.index <= run.start:
            continue
        if task.name in done or life.state in ("finished", "closing"):
            links.append(Link(task.concept, "done", 100))
        elif at is not None and task.name == at.task:
            links.append(Link(task.concept, "now", round(100 * at.share)))
        else:
            links.append(Link(task.concept, "next", 0))
    return links


def count_numbers(life: Life, at: Progress | None, one: ScoredRun) -> list[dict[str, str]]:
    """The figures under the lead."""
    told: list[tuple[str, str, str]] = []
    if at is not None:
        told.append(("task", f"{at.position} of {at.tasks}", at.task))
        told.append(("step", f"{at.step:,}", f"of {at.total:,} in this task"))
        if left := _left(life, at):
            told.append(("time left", say_duration(left.seconds), _note_time(life, at, left)))
        if at.loss is not None:
            told.append(("loss", f"{at.loss:.4f}", "mean of the last 25 steps"))
        if at.rehearsal is not None:
            told.append(("rehearsal loss", f"{at.rehearsal:.4f}", "of what earlier tasks taught"))
        if at.memory_mb:
            told.append(("memory", f"{at.memory_mb / 1000:.1f} GB", "peak, in this task"))
    if one.recognition is not None:
        found = one.recognition
        value = f"{len(found.kept)} of {len(found.tasks)}"
        told.append(("still recognised", value, "concepts, when last scored"))
    return [{"label": label, "value": value, "note": note} for label, value, note in told]


def _left(life: Life, at: Progress) -> TimeLeft | None:
    """What is left of a run that goes on; of one that is being scored, the scoring, if known."""
    if life.state == "closing":
        return TimeLeft(0.0, at.left.scoring) if at.left.scoring else None
    return at.left if life.state == "running" else None


def _note_time(life: Life, at: Progress, left: TimeLeft) -> str:
    """What the time left is made of; it is an estimate and says so."""
    note = f"an estimate, until about {say_moment(time.time() + left.seconds)}"
    if life.state == "closing":
        return f"{note}, to draw what is scored"
    note += f", at {at.pace:.2f} s a step"
    if left.scoring is None:
        return f"{note}; the scores at its end come on top"
    return f"{note}; {say_duration(left.scoring)} of it for the scores" if left.scoring else note


def go_on(run: RunFacts, facts: Facts) -> Going:
    """Where a run that was broken off goes on, and the command that does it (of run.json)."""
    command = facts.get("command")
    command = command if isinstance(command, dict) else {}
    line, place = str(command.get("line", "")), str(command.get("folder", ""))
    here = not place or Path(place) == Path.cwd()
    own, learned = own_tasks(run), len(run.lineage)
    where = "the last task's samples and the report"
    if learned < len(own):
        step = _saved_step(run.folder, run.start + learned + 1)
        begin = f"step {step:,}" if step else "the beginning"
        where = f"{begin} of task {learned + 1} of {len(own)}, {own[learned]}"
    return Going(where, line, "" if here else place)


def _saved_step(folder: Path, index: int) -> int:
    """The step of a task's newest whole state; 0 without one."""
    names = [manifest.parent.name for manifest in folder.glob("state/*/state.json")]
    found = [match for match in map(STATE.fullmatch, names) if match and int(match[1]) == index]
    return max((int(match[2]) for match in found), default=0)
