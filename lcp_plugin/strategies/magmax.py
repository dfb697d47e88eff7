"""Selection by magnitude, MagMax (arXiv 2410.04891 after arXiv 2407.06322).

`reference=running` (the paper): task t trains a fresh adapter on W_0 + D_{t-1}; entry by entry
    M_t = U_t where |U_t| >= |M_{t-1}|, else M_{t-1};   D_t = s M_t,   s = 1 unless given.
`reference=original` (Marczak et al.): task t goes on from the *unselected* weights W_0 + T_{t-1},
    T_t = T_{t-1} + U_t;   D_t = s M_t,   s = 0.5 unless given;
    M_t = T_t where |T_t| >= |M_{t-1}|, else M_{t-1}.

Where we differ from the authors' code: the update itself is kept in fp32, theirs is the difference
of two half-precision pipelines; ties go to the newest task.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.delta import Delta, delta_from_tensors, delta_to_tensors
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.lora import check_init
from lcp_plugin.tasks import Task

REFERENCES = ("running", "original")


class MagMax(Strategy):
    """Entry by entry keep the update of larger magnitude; forgets least, learns least."""

    name = "magmax"

    def __init__(
        self, reference: str = "running", scale: float | None = None, init: str = "gaussian"
    ) -> None:
        if reference not in REFERENCES:
            raise StrategyError(
                f"magmax: reference = '{reference}' is not known; use {' or '.join(REFERENCES)}."
            )
        self.reference = reference
        self.scale = scale if scale is not None else (1.0 if reference == "running" else 0.5)
        self.init = check_init(init)
        self.starts_from_parent = reference == "running"
        self.selected: Delta | None = None  # M, where it is not the carry itself
        self.unselected: Delta | None = None  # T, for reference=original

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """A fresh adapter on W_0 + D_{t-1}, or on W_0 + T_{t-1}."""
        base = carry.total if self.unselected is None else self.unselected
        return TaskStart(base=base, adapter=spec.fresh(self.init))

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """M_t and D_t = s M_t."""
        update = Delta.of(trained)
        older = carry.total if self.selected is None else self.selected
        if self.reference == "original":
            before = carry.total if self.unselected is None else self.unselected
            update = before + update
            self.unselected = update
        selected = update.select_by_magnitude(older)
        if self.scale != 1:
            self.selected = selected
        return carry.after(task, delta=self._scaled(selected, carry.total, trained))

    def _scaled(self, selected: Delta, total: Delta, trained: Adapter) -> Delta:
        """s M on what was trained; modules outside of it stay as they were carried."""
        if self.scale == 1:
            return selected
        scaled = selected.weighted(self.scale)
        untouched = {name: entry for name, entry in total.items() if name not in trained}
        return Delta({**scaled, **untouched})

    def state_dict(self) -> dict[str, Tensor]:
        """M where s is not 1, T for reference=original."""
        return {
            **delta_to_tensors(self.selected or Delta(), "selected/"),
            **delta_to_tensors(self.unselected or Delta(), "unselected/"),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """M and T as they were saved; None where they were not."""
        self.selected = delta_from_tensors(state, "selected/") or None
        self.unselected = delta_from_tensors(state, "unselected/") or None
