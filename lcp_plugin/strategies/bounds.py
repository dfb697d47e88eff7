"""Upper and lower bounds that every comparison needs; none of them is continual learning.

* `joint`: all tasks' images at once, one adapter, the sum of the tasks' steps: the ceiling. The
  runner joins the tasks.
* `independent`: U_t is trained on W_0, nothing is carried: what a task can reach alone. D_t = U_t.
* `merge_at_end`: independent adapters summed, D_t = U_1 + ... + U_t with every U trained on W_0:
  what the poster of arXiv 2410.04891 calls impractical as tasks grow, since all adapters must be
  kept until the end.
"""

from __future__ import annotations

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.lora import check_init
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.tasks import Task


class Joint(MergeInit):
    """All tasks' images at once: the ceiling."""

    name = "joint"
    joins_tasks = True


class Independent(Strategy):
    """One adapter per task on the untouched base, none carried: what each task reaches alone."""

    name = "independent"
    starts_from_parent = False

    def __init__(self, init: str = "gaussian") -> None:
        self.init = check_init(init)

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """The untouched base and a fresh adapter."""
        return TaskStart(base=Delta(), adapter=spec.fresh(self.init))

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """D_t = U_t."""
        return carry.after(task, delta=Delta.of(trained))


class MergeAtEnd(Independent):
    """Independent adapters, all summed: needs every adapter until the end."""

    name = "merge_at_end"

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """D_t = D_{t-1} + U_t, though U_t was trained without D_{t-1}."""
        return carry.after(task, delta=carry.total + Delta.of(trained))
