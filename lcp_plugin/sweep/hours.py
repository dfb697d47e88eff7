"""What a sweep will cost before it starts: steps, images and GPU hours, of SDXL's real size.

Steps and images are counted as the sweep will do them: first tasks that runs share once, images of
a state of the model once. Seconds are `config.estimates`' (measured on the card that is named, or
assumed), or those that --seconds_per_step gives; rehearsal and what it draws are in them. Loading
models, boundaries, encoding data and scoring are not counted. The embedded base has no hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcp_plugin.config.estimates import (
    NATIVE_PIXELS,
    estimate_seconds,
    find_cost,
    image_seconds,
)
from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.evaluation.cards import visible_cards
from lcp_plugin.evaluation.scores import CEILINGS, count_cells
from lcp_plugin.run.forecast import TINY_COST, rehearsal_seconds
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.sweep.plan import PlannedRun, SweepPlan


@dataclass(frozen=True)
class Drawing:
    """How images are drawn for scores."""

    per_task: int  # images of a task at a state of the model
    steps: int
    side: int | None  # pixels; None: SDXL's own


@dataclass(frozen=True)
class Work:
    """What a run does that no other does for it."""

    name: str
    steps: int
    images: int
    training: float  # seconds
    drawing: float  # seconds


def count_work(plan: SweepPlan, drawing: Drawing, step_seconds: float | None) -> list[Work]:
    """Every run that is not finished yet, in order."""
    waiting = [run for run in plan.runs if not run.is_finished]
    return [
        _count_run(run, drawing, step_seconds, is_first=number == 0)
        for number, run in enumerate(waiting)
    ]


def _count_run(
    run: PlannedRun, drawing: Drawing, step_seconds: float | None, is_first: bool
) -> Work:
    config = load_config(list(run.arguments))
    options, tasks = config.options, config.tasks
    shared = min(run.shared, len(tasks)) if run.leader else 0
    steps = sum(_count_steps(task) for task in tasks[shared:])
    if step_seconds is None:
        step_seconds = estimate_seconds(options, _count_pixels(options), len(tasks))
    cells = _count_cells(run, len(tasks)) + (len(tasks) if is_first else 0)  # and the base's own
    images = cells * drawing.per_task
    pixels = drawing.side**2 if drawing.side else NATIVE_PIXELS
    seconds = image_seconds(options, pixels, drawing.steps)
    whole = step_seconds * sum(_count_steps(task) for task in tasks)  # shared tasks included
    added = sum(rehearsal_seconds(options, whole, len(tasks), _count_pixels(options)))
    return Work(run.name, steps, images, steps * step_seconds + added, images * seconds)


def _count_cells(run: PlannedRun, tasks: int) -> int:
    """(task, state of the model) pairs whose images no other run makes."""
    cells = count_cells(run.strategy, tasks)
    is_shared = run.leader and run.strategy not in CEILINGS
    return cells - 1 if is_shared else cells  # the first task's own images


def _count_steps(task: TaskConfig) -> int:
    """Optimizer steps; images are looked at only where epochs decide."""
    if task.options.max_train_epochs is None:
        return task.options.max_train_steps
    return TaskData(task, 0, 1, (1024, 1024)).total_steps()


def _count_pixels(options: Options) -> int:
    width, height = options.resolution or (1024, 1024)
    return width * height


def describe_work(plan: SweepPlan, drawing: Drawing, step_seconds: float | None) -> str:
    """The table of a sweep's dry run."""
    work = count_work(plan, drawing, step_seconds)
    if not work:
        return f"all {len(plan.runs)} runs are finished; nothing is left to train"
    width = max(len(item.name) for item in work)
    options = load_config(list(plan.runs[0].arguments)).options
    if options.pretrained_model_name_or_path == TINY_NAME:
        return _describe_tiny(work, width)
    lines = [
        f"{item.name:<{width}}  {item.steps:>7} steps {item.training / 3600:>7.2f} h  "
        f"{item.images:>6} images {item.drawing / 3600:>7.2f} h"
        for item in work
    ]
    training = sum(item.training for item in work) / 3600
    drawn = sum(item.drawing for item in work) / 3600
    finished = len(plan.runs) - len(work)
    cards = max(1, len(visible_cards()))
    lines += [
        "",
        f"{len(work)} runs to do{f', {finished} finished' if finished else ''}: training "
        f"{training:.1f} h, images {drawn:.1f} h, together {training + drawn:.1f} GPU hours",
        f"on {cards} card{'s' if cards > 1 else ''}: at least {(training + drawn) / cards:.1f} h",
        _tell_source(plan, step_seconds),
        "not counted: loading, encoding, boundaries, scoring",
    ]
    return "\n".join(lines)


def _describe_tiny(work: Sequence[Work], width: int) -> str:
    """The table for the embedded base, which no card's seconds tell anything of."""
    lines = [f"{i.name:<{width}}  {i.steps:>7} steps  {i.images:>6} images" for i in work]
    steps, images = sum(i.steps for i in work), sum(i.images for i in work)
    lines += ["", f"{len(work)} runs to do: {steps} steps, {images} images"]
    return "\n".join([*lines, *TINY_COST])


def _tell_source(plan: SweepPlan, step_seconds: float | None) -> str:
    """Whose seconds they are."""
    cost = find_cost(load_config(list(plan.runs[0].arguments)).options)
    image = "" if cost.image_seconds else "; seconds of images are an estimate"
    if step_seconds is not None:
        return f"{step_seconds:g} s a step as given{image}"
    return f"SDXL, {cost.seconds:g} s a step of one image, on {cost.told}{image}"
