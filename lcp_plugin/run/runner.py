"""A run: learn a sequence of tasks, one boundary after another. Read `Run.learn` first.

Order of things on disk: the task folder (lineage.json last), then the deliverable, samples and
run.json, then on_task_end is noted as done. A run that was killed anywhere goes on behind the last
whole one of these.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from lcp_plugin.config.load import RunConfig
from lcp_plugin.hooks import Carry
from lcp_plugin.run.boundary import deliver, finish_boundaries, sample_base
from lcp_plugin.run.context import Context
from lcp_plugin.run.lessons import end_lesson, prepare_lesson, save_lesson, watch_lesson
from lcp_plugin.run.network_weights import read_network_weights
from lcp_plugin.run.opening import load_base, start_chain, start_processes, take_place
from lcp_plugin.run.plan import RunPlan, join_plan
from lcp_plugin.run.record import Logbook, describe_parent
from lcp_plugin.run.samples import SampleDrawing
from lcp_plugin.run.session import stopping_on_signals, thawing
from lcp_plugin.run.settling import settle
from lcp_plugin.run.trackers import create_observers
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.store.lock import locked
from lcp_plugin.tasks import Task
from lcp_plugin.training.lesson import Classroom
from lcp_plugin.training.loop import train_lesson
from lcp_plugin.training.processes import Processes, share_carry, share_object, share_tensors


@dataclass(frozen=True, eq=False)
class Run(Context):
    """A run that is under way."""

    def learn(self) -> Carry:
        """Every task that is not yet on disk, in order; first, what is on disk is delivered."""
        carry = share_carry(self.accelerator, self.restore)
        self.share_strategy()
        learned = share_object(self.accelerator, len(self.store.folders()))
        if self.is_main:
            sample_base(self)
            finish_boundaries(self)
        for task in self.tasks[learned:]:
            carry = self.learn_task(task, carry)
            if self.is_main:
                finish_boundaries(self, carry)
            self.accelerator.wait_for_everyone()
        return carry

    def learn_task(self, task: Task, carry: Carry) -> Carry:
        """begin_task, training, end_task, and the task folder complete on disk."""
        lesson = prepare_lesson(self, task, carry)
        self.tell("on_task_begin", task)
        trained = train_lesson(lesson, self.room, watch_lesson(self, lesson))
        after = share_carry(self.accelerator, lambda: end_lesson(self, lesson, trained))
        save_lesson(self, lesson, trained, after)
        self.share_strategy()
        return after

    def restore(self) -> Carry:
        """The carry to go on from, and the strategy's state behind it."""
        folders = self.store.folders()
        parent = folders[-1].parent() if folders else self.plan.parent
        if parent.strategy == self.strategy.name and parent.state:
            self.strategy.load_state_dict(parent.state)
        return parent.carry

    def share_strategy(self) -> None:
        """The strategy's state on every process: step hooks run everywhere."""
        if self.accelerator.num_processes > 1:
            state = share_tensors(self.accelerator, self.strategy.state_dict())
            if state and not self.is_main:
                self.strategy.load_state_dict(state)


@thawing()
def execute(config: RunConfig) -> Run:
    """Runs a configuration to its end.

    Raises:
        LcpError: one line. Interrupted: a signal came; the state is saved.
    """
    config = settle(config)
    accelerator = start_processes(config.options)
    plan = join_plan(config, accelerator)
    logbook = Logbook(plan.store, plan.facts, accelerator.is_main_process)
    stop = threading.Event()
    lock = locked(plan.store.root, plan.name) if accelerator.is_main_process else nullcontext()
    with lock, stopping_on_signals(stop):
        for notice in config.notices:
            logbook.say(notice)
        base = load_base(config.options, accelerator)
        run = make_run(plan, base, accelerator, logbook, stop.is_set)
        take_place(run)
        run = replace(run, observers=create_observers(run))
        try:
            run.tell("on_run_begin")
            carry = run.learn()
            if run.is_main:
                deliver(run, carry)
            run.write_facts(status="finished")
            run.tell("on_run_end")
        except BaseException as error:
            run.tell("on_exception", error)
            raise
    return run


def make_run(
    plan: RunPlan,
    base: LiveBase,
    accelerator: Processes,
    logbook: Logbook,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Run:
    """A run that nobody watches as yet."""
    drawing = SampleDrawing.of(plan.options, base)
    room = Classroom(
        base=base,
        accelerator=accelerator,
        strategy=plan.strategy,
        store=plan.store,
        seed=plan.seed,
        weights=read_network_weights(plan.options),
        draw=drawing.draw,
        stop_requested=stop_requested,
    )
    started = start_chain(plan, room)
    if started is not plan:
        logbook.note(**describe_parent(started.parent))
    return Run(started, room, logbook, drawing)
