"""What a run holds while it goes on, and what observers see of it (`hooks.RunView`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.config.options import Options
from lcp_plugin.errors import LcpError
from lcp_plugin.hooks import Observer, Strategy
from lcp_plugin.run.plan import RunPlan
from lcp_plugin.run.record import Logbook
from lcp_plugin.run.samples import SampleDrawing
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task, TaskRecord
from lcp_plugin.training.lesson import Classroom
from lcp_plugin.training.processes import Processes


@dataclass(frozen=True, eq=False)
class Context:
    """The plan, where lessons take place, and who is told of them."""

    plan: RunPlan
    room: Classroom
    logbook: Logbook
    drawing: SampleDrawing
    observers: tuple[Observer, ...] = ()

    # ------------------------------------------------------------------- as observers see a run

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.store.root

    @property
    def name(self) -> str:
        """output_name."""
        return self.plan.name

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The run's tasks in order."""
        return self.plan.tasks

    @property
    def strategy(self) -> Strategy:
        """Who decides what crosses a boundary."""
        return self.plan.strategy

    @property
    def seed(self) -> int:
        """What all random numbers are derived from."""
        return self.plan.seed

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.accelerator.device)

    @property
    def facts(self) -> dict[str, Any]:
        """run.json."""
        return self.logbook.facts

    # --------------------------------------------------------------------- and the run itself

    @property
    def options(self) -> Options:
        """The run's options, settled."""
        return self.plan.options

    @property
    def store(self) -> RunStore:
        """The run's place on disk."""
        return self.plan.store

    @property
    def base(self) -> LiveBase:
        """The live model."""
        return self.room.base

    @property
    def accelerator(self) -> Processes:
        """This process among the others."""
        return self.room.accelerator

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def all_records(self) -> tuple[TaskRecord, ...]:
        """The parent's tasks and this run's."""
        own = tuple(record for task in self.tasks for record in task.records())
        return (*self.plan.parent.carry.tasks, *own)

    # ---------------------------------------------------------------------------- who is told

    def tell(self, hook: str, *args: Any) -> None:
        """Calls a hook of every observer, on the main process; none may return a value."""
        if not self.is_main:
            return
        for observer in self.observers:
            if getattr(observer, hook)(self, *args) is not None:
                raise LcpError(
                    f"observer {observer.name}: {hook} returned a value; it must be None."
                )

    def observer_states(self) -> dict[str, Any]:
        """State of every observer that has some."""
        states: Mapping[str, Any] = {
            f"{i}:{o.name}": o.state_dict() for i, o in enumerate(self.observers)
        }
        return {key: state for key, state in states.items() if state}

    def write_facts(self, status: str) -> None:
        """run.json, with the observers' states."""
        self.logbook.write(status, self.observer_states())
