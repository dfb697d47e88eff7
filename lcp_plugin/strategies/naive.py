"""Naive continual fine-tuning: keep training the same factors (arXiv 2410.04891, the baseline).

(A, B)_t starts where (A, B)_{t-1} ended, with a fresh optimizer; D_t = scale B_t A_t. Alpha and
rank are those of the factors that go on, not those of the new run's options. The paper's finding:
everything learned before drifts away.

Where we differ from the authors' code: factors of modules that this run does not train are kept in
the delta (theirs has one fixed set of modules), and factors carried by a merging strategy are left
alone while fresh ones go on.
"""

from __future__ import annotations

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.lora import check_init
from lcp_plugin.tasks import Task


class Naive(Strategy):
    """Keep training the same factors; what was learned before is overwritten."""

    name = "naive"

    def __init__(self, init: str = "gaussian") -> None:
        self.init = check_init(init)

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """The carried factors where there are any, fresh ones elsewhere."""
        going_on = (carry.adapter or Adapter()).restrict(spec.shapes)
        adapter = Adapter({**spec.fresh(self.init), **going_on})
        return TaskStart(base=self._resting(carry, adapter), adapter=adapter)

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """The trained factors go on; whatever did not train rests in the delta."""
        return carry.after(task, delta=self._resting(carry, trained), adapter=trained)

    @staticmethod
    def _resting(carry: Carry, training: Adapter) -> Delta:
        resting = (carry.adapter or Adapter()).without(training)
        return carry.delta + Delta.of(resting) if resting else carry.delta
