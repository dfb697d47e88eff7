"""Plugins that tests name as `plugin_samples:Class`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, Model, Rehearsal, Step, Strategy, TaskStart
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.strategies.recall import Recall
from lcp_plugin.tasks import Task


class Penalised(MergeInit):
    """Uses a hook that sd-scripts never calls."""

    name = "penalised"

    def before_backward(self, step: Any, loss: Tensor) -> Tensor:
        return loss * 2


class Rehearsing(MergeInit):
    """Rehearses and does nothing else."""

    def rehearse(self, step: Step) -> Rehearsal | None:
        return None


PLUGIN = """
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Observer, Strategy, TaskStart

class Halving(Strategy):
    \"\"\"Every boundary halves what was there.

    Not part of the summary.
    \"\"\"
    name = "halving"

    def __init__(self, factor: float = 0.5, tag: str = "x") -> None:
        self.factor, self.tag = factor, tag

    def begin_task(self, task, carry, spec):
        return TaskStart(base=carry.total, adapter=spec.gaussian())

    def end_task(self, task, carry, trained):
        total = carry.total.weighted(self.factor) + Delta.of(trained)
        return carry.after(task, delta=total)

class Counting(Observer):
    \"\"\"Counts tasks.\"\"\"
    name = "counting"

    def on_task_end(self, run, task, carry):
        pass
"""


class Whole(Strategy):
    """A complete strategy to break in one place at a time."""

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        return TaskStart(base=carry.total, adapter=spec.gaussian())

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        return carry.after(task, delta=Delta.of(trained))


class Distant(MergeInit):
    """A third party's strategy, which recall rehearses."""


class Counting(Recall):
    """Writes down each drawing, and dies where the environment says."""

    def _draw(self, model: Model, *args: Any) -> dict[str, torch.Tensor]:
        self._note("draw")
        return super()._draw(model, *args)

    def after_optimizer_step(self, step: Step) -> None:
        if self.banks:
            self._note("step")
        super().after_optimizer_step(step)

    def _note(self, event: str) -> None:
        path = Path(os.environ["RECALL_LOG"])
        with path.open("a") as file:
            file.write(event + "\n")
        written = path.read_text().split()
        if os.environ.get("RECALL_KILL") == f"{event} {written.count(event)}":
            os.kill(os.getpid(), signal.SIGKILL)


class Ranks(Recall):
    """Writes down what each process drew, rehearsed and learned."""

    def __init__(self, images: int = 2, sample_steps: int = 2, folder: str = ".") -> None:
        super().__init__(images=images, sample_steps=sample_steps, preserve=0.5)
        self.folder = folder
        self.rehearsed: list[float] = []

    def rehearse(self, step: Step) -> Rehearsal | None:
        found = super().rehearse(step)
        if found is not None:
            self.rehearsed.append(float(found.latents.double().sum()))
        return found

    def after_training(self, model: Model) -> None:
        banks = [bank for sizes in (*self.banks, *self.preserved) for bank in sizes]
        facts = {
            "drawn": [float(bank.latents.double().sum()) for bank in banks],
            "rehearsed": self.rehearsed,
            "learned": [float(up.detach().double().sum()) for _, up in model.parameters.values()],
        }
        path = Path(self.folder) / f"rank{os.environ['RANK']}_task{model.task.index}.json"
        path.write_text(json.dumps(facts), encoding="utf-8")
        self.rehearsed = []
        super().after_training(model)


class Noisy(MergeInit):
    """Rehearses noise, in more rows than the task's batch: the loop cuts it in pieces."""

    def before_training(self, model: Model) -> None:
        self.conditioning = model.encode_prompts(["a toy"] * 5, model.sizes()[0])
        self.size = model.sizes()[0]

    def rehearse(self, step: Step) -> Rehearsal | None:
        assert len(step.batch["time_ids"]) < 5
        shape = (5, 4, *self.size)
        latents, target = (torch.randn(shape, generator=step.generator) for _ in range(2))
        return Rehearsal(latents, torch.full((5,), 500), self.conditioning, target, 1.0)
