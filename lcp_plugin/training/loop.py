"""The training of one task: W_0 + start.base frozen, start.adapter trained.

`learn_steps` yields after every optimizer step; states, intermediate files, samples, validation and
observers are readers of what it yields. Hooks are called where DESIGN says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lcp_plugin.errors import NumericError
from lcp_plugin.hooks import StepReport
from lcp_plugin.sdxl.precision import Precision, peak_memory_mb
from lcp_plugin.training.learner import Learner
from lcp_plugin.training.lesson import Classroom, Lesson, Trained
from lcp_plugin.training.modules import set_dropout
from lcp_plugin.training.passes import collect_gradients
from lcp_plugin.training.processes import share_object
from lcp_plugin.training.state import resume, save_state

REMEDIES = "lower learning_rate, train with mixed_precision=bf16 or no, or look at the images"


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


class Reader(Protocol):
    """What looks at a lesson between its steps."""

    def visit(self, learner: Learner) -> None:
        """After `learner.step` steps; 0: before the first."""

    def finish(self, learner: Learner) -> None:
        """Behind the last step."""


@dataclass(frozen=True)
class Watch:
    """Who looks on while a task is learned."""

    on_step: Callable[[StepReport], None] = lambda report: None
    readers: Sequence[Reader] = ()
    observer_states: Callable[[], dict[str, Any]] = dict


def train_lesson(lesson: Lesson, room: Classroom, watch: Watch) -> Trained:
    """Trains `lesson.start.adapter` and returns its factors.

    Raises:
        NumericError: a loss is not finite; the last saved state stays.
        Interrupted: a stop was requested; the state is saved.
        ResumeError: a saved state was made from other images or another optimizer.
    """
    fused = place_start(lesson, room)
    adapted = room.base.adapted
    try:
        learner = Learner(lesson, room)
        resume(learner)
        learner.set_mode("train")
        if learner.step == 0:
            _show(learner, watch)
        for report in learn_steps(learner):
            watch.on_step(report)
            _show(learner, watch)
            _save_if_due(learner, watch)
        for reader in watch.readers:
            reader.finish(learner)
        learner.set_mode("eval")
        room.strategy.after_training(learner.model)
        trained = adapted.trained()
        trained.check_finite()
    finally:
        adapted.detach()
        room.accelerator.free_memory()
    return Trained(trained, {"fused": fused, **_describe(learner)})


def place_start(lesson: Lesson, room: Classroom) -> dict[str, float]:
    """Base, carry and adapter of the task's start on the model; how the base was rounded."""
    start, base, total = lesson.start, room.base, lesson.carry.total
    fused = base.adapted.set_base(start.base, base.carry_as)
    base.adapted.biases.set(lesson.carry.biases)
    base.adapted.set_carry(start.base if total is start.base else total)
    base.adapted.attach(start.adapter, start.trainable, Precision.of(lesson.options).factors)
    set_dropout(base.adapted.pair_of.values(), lesson.options)
    return fused


def learn_steps(learner: Learner) -> Iterator[StepReport]:
    """A report after each optimizer step, until the task's total or a NaN."""
    batches = _load_batches(learner)
    while learner.step < learner.total:
        began = time.monotonic()
        measured, live = collect_gradients(learner, batches)
        learner.updates.apply(learner.step, live)
        loss, objective, rehearsal = measured.tolist()  # the step's one wait for the device
        _check_finite(learner, objective)
        learner.count_step()
        yield StepReport(
            task=learner.lesson.task,
            index=learner.step,
            total=learner.total,
            loss=loss,
            objective=objective,
            lr=learner.updates.rate,
            seconds=time.monotonic() - began,
            peak_memory_mb=peak_memory_mb(learner.room.base.device),
            rehearsal=None if math.isnan(rehearsal) else rehearsal,
        )


def _load_batches(learner: Learner) -> Iterator[Mapping[str, Any]]:
    options, accelerator = learner.lesson.options, learner.room.accelerator
    world = int(accelerator.num_processes)
    together = options.gradient_accumulation_steps * world
    return learner.lesson.data.loader(
        start=learner.step * together,
        stop=learner.total * together,
        workers=options.max_data_loader_n_workers,
        stride=world,
        offset=int(accelerator.process_index),
    )


def _check_finite(learner: Learner, loss: float) -> None:
    if not math.isfinite(loss):
        kept = "nothing was learned so far"
        if learner.room.store.holds_work():
            kept = "what was learned before is kept (other settings start over: --overwrite)"
        raise NumericError(
            f"the loss of task {learner.lesson.task.name} became {loss} at step "
            f"{learner.step + 1}; {kept}. Try: {REMEDIES}."
        )


def _show(learner: Learner, watch: Watch) -> None:
    for reader in watch.readers:
        reader.visit(learner)


def _save_if_due(learner: Learner, watch: Watch) -> None:
    """The state, every so many steps; and, where a stop was asked for, before it."""
    accelerator, every = learner.room.accelerator, learner.lesson.options.resume_every_n_steps
    stop = learner.room.stop_requested()
    if accelerator.num_processes > 1:
        stop = bool(share_object(accelerator, stop))
    due = every > 0 and learner.step % every == 0 and learner.step < learner.total
    if (due or stop) and learner.is_main:
        save_state(learner, watch.observer_states())
    if stop:
        accelerator.wait_for_everyone()
        raise Interrupted(
            f"stopped at step {learner.step} of {learner.total} of task "
            f"{learner.lesson.task.name}; the same command goes on from there."
        )


def _describe(learner: Learner) -> dict[str, Any]:
    """What lineage.json says of the training."""
    facts: dict[str, Any] = {"optimizer": learner.updates.optimizer_name, "steps": learner.step}
    return {**facts, "validation": learner.validation} if learner.validation else facts
