"""Merge & init (arXiv 2410.04891): add the finished update, start the next adapter afresh.

U_t = scale B_t A_t;  D_t = D_{t-1} + U_t;  task t trains on W_0 + D_{t-1}: A Gaussian, B = 0.

Where we differ from the authors' code: D is kept as stacked factors in fp32 and added to untouched
weights, so no boundary forgets by rounding; theirs saves a half-precision pipeline it fused into.
"""

from __future__ import annotations

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.lora import check_init
from lcp_plugin.tasks import Task


class MergeInit(Strategy):
    """Sum the updates in weight space; every adapter starts as if it were the first."""

    name = "merge_init"

    def __init__(self, init: str = "gaussian") -> None:
        self.init = check_init(init)

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """All that was learned rests in the base; the adapter is fresh."""
        return TaskStart(base=carry.total, adapter=spec.fresh(self.init))

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """D_t = D_{t-1} + U_t."""
        return carry.after(task, delta=carry.total + Delta.of(trained))
