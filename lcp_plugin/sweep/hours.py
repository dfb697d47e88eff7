"""What a sweep will cost before it starts: steps, images and hours.

Steps and images are counted as the sweep will do them: first tasks that runs share once, images of
a state of the model once. Seconds are `config.estimates`' (measured on the card that is named, or
assumed), or those that --seconds_per_step gives; rehearsal and what it draws are in them. Loading
models, boundaries, encoding data and scoring are not counted. The embedded base's seconds are those
of a process with one core (medians of the quickstart on an AMD EPYC with AVX2: .3 to .5 s a step of
four images and .6 to 1 s an image of 12 steps with two cores).
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
from lcp_plugin.run.forecast import rehearsal_seconds
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.sweep.plan import PlannedRun, SweepPlan
from lcp_plugin.telling.wording import agree, counted, say_duration

TINY_STEP = 0.5  # seconds of a step of the embedded base
TINY_DENOISING = 0.12  # and of a denoising step of one image


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
    tiny, pixels = _is_tiny(options), drawing.side**2 if drawing.side else NATIVE_PIXELS
    if step_seconds is None:
        own = estimate_seconds(options, _count_pixels(options), len(tasks))
        step_seconds = TINY_STEP if tiny else own
    cells = _count_cells(run, len(tasks)) + (len(tasks) if is_first else 0)  # and the base's own
    images = cells * drawing.per_task
    seconds = image_seconds(options, pixels, drawing.steps)
    seconds = drawing.steps * TINY_DENOISING if tiny else seconds
    whole = step_seconds * sum(_count_steps(task) for task in tasks)  # shared tasks included
    rehearsed, drawn = rehearsal_seconds(options, whole, len(tasks), _count_pixels(options))
    training = steps * step_seconds + rehearsed + (0.0 if tiny else drawn)
    return Work(run.name, steps, images, training, images * seconds)


def _is_tiny(options: Options) -> bool:
    return options.pretrained_model_name_or_path == TINY_NAME


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


def describe_work(
    plan: SweepPlan, drawing: Drawing, step_seconds: float | None, processes: int
) -> str:
    """The table of a sweep's dry run, and its sum."""
    work = count_work(plan, drawing, step_seconds)
    width = max((len(item.name) for item in work), default=0)
    if work and _is_tiny(_options_of(plan)):
        lines = [f"{item.name:<{width}}  {'  '.join(_say_sums(item))}" for item in work]
    else:
        lines = [
            f"{item.name:<{width}}  {_say_sums(item)[0]} {item.training / 3600:>7.2f} h  "
            f"{_say_sums(item)[1]} {item.drawing / 3600:>7.2f} h"
            for item in work
        ]
    return "\n".join(
        [*lines, *([""] if lines else []), *sum_up(plan, work, processes, step_seconds)]
    )


def sum_up(
    plan: SweepPlan, work: Sequence[Work], processes: int, step_seconds: float | None
) -> list[str]:
    """What all of it takes, in a few lines. `processes`: runs at a time, where there is no card."""
    if not work:
        return [f"all of {counted(len(plan.runs), 'run')} finished; nothing is left to train"]
    finished = len(plan.runs) - len(work)
    steps = counted(sum(item.steps for item in work), "step")
    images = counted(sum(item.images for item in work), "image")
    done = f", {finished} finished" if finished else ""
    lines = [f"{counted(len(work), 'run')} to do{done}: {steps}, {images}"]
    training, drawn = sum(item.training for item in work), sum(item.drawing for item in work)
    uncounted = "not counted: loading, encoding, boundaries, scoring"
    if _is_tiny(_options_of(plan)):
        training, drawn = training / processes, drawn / processes
        each = step_seconds or TINY_STEP
        return [
            *lines,
            f"about {say_duration(training + drawn)} on {counted(processes, 'core')}: training "
            f"{say_duration(training)}, images {say_duration(drawn)}",
            f"estimated at {each:g} s a step of {TINY_NAME} on a core; {uncounted}",
        ]
    cards = max(1, len(visible_cards()))
    hours, images_hours = training / 3600, drawn / 3600
    return [
        *lines,
        f"training {hours:.1f} h, images {images_hours:.1f} h, "
        f"together {hours + images_hours:.1f} GPU hours",
        f"on {counted(cards, 'card')}: at least {(hours + images_hours) / cards:.1f} h",
        _tell_source(plan, step_seconds),
        uncounted,
    ]


def _say_sums(item: Work) -> tuple[str, str]:
    """Steps and images of a run, as columns."""
    steps, images = agree(item.steps, "step"), agree(item.images, "image")
    return f"{item.steps:>7} {steps:<5}", f"{item.images:>6} {images:<6}"


def _options_of(plan: SweepPlan) -> Options:
    return load_config(list(plan.runs[0].arguments)).options


def _tell_source(plan: SweepPlan, step_seconds: float | None) -> str:
    """Whose seconds they are."""
    cost = find_cost(_options_of(plan))
    image = "" if cost.image_seconds else "; seconds of images are an estimate"
    if step_seconds is not None:
        return f"{step_seconds:g} s a step as given{image}"
    return f"SDXL, {cost.seconds:g} s a step of one image, on {cost.told}{image}"
