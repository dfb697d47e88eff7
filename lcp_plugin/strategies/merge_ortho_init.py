"""Merge & orthogonal init (arXiv 2410.04891): merge & init that starts away from earlier A's.

`mode=column` (the paper): column i of the new A is a unit vector orthogonal to column i of
A_{1..t-1} = A_1 + ... + A_{t-1} (`lora.orthogonal_columns`), B = 0. That is orthogonality in rank
space; it says nothing about row spaces. `mode=row_null`: A's rows are orthonormal and orthogonal to
the row space of D_{t-1}; where no null space of that width is left, the directions with the least
energy (one warning).
`scale=unit` keeps unit columns, ||A||_F = sqrt(in); `scale=match_gaussian` rescales A to the
Gaussian start's expected norm, sqrt(in / rank).
`merge=exact` (default): D_t = D_{t-1} + U_t. `merge=factor_sum`, the released code:
D_t = scale (B_1 + ... + B_t)(A_1 + ... + A_t), cross terms included; the next task then starts from
that D_t, so what is delivered is not the model that was trained.

Where we differ from the authors' code: the exact merge; the closed form instead of one SVD per
column; the check of orthogonality lives in a test. Without the running sum of A's in the parent (a
file of another strategy or tool): the sum of its equal-rank blocks, else the top right singular
vectors of D, said in one line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, Entry, Stacked
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.lora import check_init, orthogonal_columns, row_null_rows, top_right_vectors
from lcp_plugin.tasks import Task
from lcp_plugin.telling.wording import counted

log = logging.getLogger(__name__)

CHOICES = {
    "merge": ("exact", "factor_sum"),
    "mode": ("column", "row_null"),
    "scale": ("unit", "match_gaussian"),
}


class MergeOrthoInit(Strategy):
    """Sum the updates; every adapter starts orthogonal to the sum of the earlier A's."""

    name = "merge_ortho_init"

    def __init__(
        self,
        merge: str = "exact",
        mode: str = "column",
        scale: str = "unit",
        init: str = "gaussian",
    ) -> None:
        for option, value in (("merge", merge), ("mode", mode), ("scale", scale)):
            if value not in CHOICES[option]:
                wanted = " or ".join(CHOICES[option])
                raise StrategyError(f"merge_ortho_init: {option} = '{value}'; use {wanted}.")
        self.merge, self.mode, self.scale = merge, mode, scale
        self.init = check_init(init)
        self.sum_down: dict[str, Tensor] = {}  # A_{1..t}, (rank, in) each
        self.sum_up: dict[str, Tensor] = {}  # B_{1..t}, (out, rank) each; factor_sum only

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """W_0 + D_{t-1} and a start orthogonal to what came before; a first task starts afresh."""
        if self.mode == "column" and any(spec.rank_of(name) < 2 for name in spec.shapes):
            raise StrategyError(
                "merge_ortho_init needs network_dim >= 2: rank 1 has no orthogonal column."
            )
        total = carry.total
        learned = [name for name in spec.shapes if name in total]
        if self.merge == "factor_sum":
            self._check_own_chain({name: spec.rank_of(name) for name in learned})
        fresh = spec.fresh(self.init)
        start = self._null_rows if self.mode == "row_null" else self._orthogonal_columns
        downs = start(learned, total, spec)
        return TaskStart(
            base=total, adapter=fresh.map_down(lambda name, down: downs.get(name, down))
        )

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """D_t, and the running sums for the next start."""
        total = carry.total
        earlier = self._accumulated([n for n in trained if n in total], total, trained)
        self.sum_down = {
            name: factors.down + earlier[name] if name in earlier else factors.down
            for name, factors in trained.items()
        }
        if self.merge == "exact":
            return carry.after(task, delta=total + Delta.of(trained))
        return carry.after(task, delta=self._factor_sum(total, trained))

    def _check_own_chain(self, ranks: Mapping[str, int]) -> None:
        """Raises StrategyError unless the sum of B's is known at these ranks, before training."""
        for name, rank in ranks.items():
            if name not in self.sum_up or self.sum_up[name].shape[1] != rank:
                raise StrategyError(
                    "merge_ortho_init: merge=factor_sum continues only its own chains, at one "
                    "network_dim; use merge=exact."
                )

    def _factor_sum(self, total: Delta, trained: Adapter) -> Delta:
        self._check_own_chain({name: f.rank for name, f in trained.items() if name in total})
        for name, factors in trained.items():
            earlier = self.sum_up.get(name)
            self.sum_up[name] = factors.up if earlier is None else earlier + factors.up
        summed = Adapter(
            {
                name: Factors(self.sum_down[name], self.sum_up[name], f.alpha, f.kernel)
                for name, f in trained.items()
            }
        )
        rest = Delta({name: entry for name, entry in total.items() if name not in trained})
        return rest + Delta.of(summed)

    def _accumulated(
        self, names: list[str], total: Delta, like: Adapter | AdapterSpec
    ) -> dict[str, Tensor]:
        """A_{1..t-1} of modules at their rank: the state, else equal-rank blocks, else from D."""
        sums: dict[str, Tensor] = {}
        guessed = 0
        for name in names:
            rank = like.rank_of(name) if isinstance(like, AdapterSpec) else like[name].rank
            known = self.sum_down.get(name)
            if known is None or known.shape[0] != rank:
                known = sum_equal_blocks(total[name], rank)
            if known is None:
                known, guessed = _main_directions(total[name], rank), guessed + 1
            sums[name] = known
        if guessed and isinstance(like, AdapterSpec):
            log.info(
                "merge_ortho_init: the parent records no A's of this rank for %s; "
                "starting orthogonal to the top right singular vectors of its delta.",
                counted(guessed, "module"),
            )
        return sums

    def _orthogonal_columns(
        self, names: list[str], total: Delta, spec: AdapterSpec
    ) -> dict[str, Tensor]:
        downs = {}
        for name, previous in self._accumulated(names, total, spec).items():
            down = orthogonal_columns(previous)  # (rank, in)
            downs[name] = down / math.sqrt(down.shape[0]) if self.scale != "unit" else down
        return downs

    def _null_rows(self, names: list[str], total: Delta, spec: AdapterSpec) -> dict[str, Tensor]:
        downs, filled = {}, 0
        for name in names:
            entry, rank = total[name], spec.rank_of(name)
            space = entry.down if isinstance(entry, Stacked) else entry.dense()
            rows, wide = row_null_rows(space, rank, spec.generator(name, "row_null"))
            filled += not wide
            inputs = spec.shapes[name][1]
            downs[name] = rows * (math.sqrt(inputs) / rank) if self.scale != "unit" else rows
        if filled:
            log.warning(
                "merge_ortho_init: no null space of the rank is left for %s; "
                "what starts there uses the directions of least energy.",
                counted(filled, "module"),
            )
        return downs

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums."""
        state = {f"sum_down/{name}": tensor for name, tensor in self.sum_down.items()}
        state.update({f"sum_up/{name}": tensor for name, tensor in self.sum_up.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The running sums as they were saved."""
        self.sum_down = {k[9:]: v for k, v in state.items() if k.startswith("sum_down/")}
        self.sum_up = {k[7:]: v for k, v in state.items() if k.startswith("sum_up/")}


def sum_equal_blocks(entry: Entry, rank: int) -> Tensor | None:
    """A_1 + A_2 + ... of a stacked delta whose updates all have this rank; None otherwise."""
    if not isinstance(entry, Stacked) or any(block != rank for block in entry.blocks):
        return None
    return torch.stack(torch.split(entry.down, rank)).sum(dim=0)  # (rank, in)


def _main_directions(entry: Entry, rank: int) -> Tensor:
    if isinstance(entry, Stacked):
        return top_right_vectors(entry.up, entry.down, rank)
    return top_right_vectors(entry.dense(), torch.eye(entry.shape[1]), rank)
