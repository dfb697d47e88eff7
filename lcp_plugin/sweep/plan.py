"""What a sweep runs: strategies x orders x seeds, and who takes over whose first tasks.

A lane is one (order, seed): the same tasks in the same order from the same seed. Its first run
leads; the others take over the leader's first task, because a first task is trained alike under
every strategy that starts it alike. `merge_at_end` takes over all tasks of `independent`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.store.run_folder import RunStore


@dataclass(frozen=True)
class Lane:
    """The same tasks in the same order from the same seed."""

    order: int | None  # order_seed; None: as the config's file has them
    seed: int

    def name_of(self, strategy: str) -> str:
        """The name of a strategy's run in this lane."""
        return f"{strategy}{'' if self.order is None else f'_order{self.order}'}_seed{self.seed}"


@dataclass(frozen=True)
class SweepAxes:
    """What a sweep compares."""

    strategies: Sequence[str]
    ceilings: Sequence[str] = ()
    orders: Sequence[int | None] = (None,)
    seeds: Sequence[int] = (0,)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Every order with every seed."""
        return tuple(Lane(order, seed) for order in self.orders for seed in self.seeds)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    strategy: str
    order_seed: int | None
    seed: int
    output_dir: str
    name: str
    arguments: tuple[str, ...]  # of the training command
    leader: str = ""  # name of the run whose first tasks are taken over
    shared: int = 1  # tasks to take over

    @property
    def store(self) -> RunStore:
        """Where it is written."""
        return RunStore(Path(self.output_dir), self.name)

    @property
    def is_finished(self) -> bool:
        """Whether run.json says so."""
        facts = self.store.read_run()
        return facts is not None and facts.get("status") == "finished"


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep in waves: within a wave, none waits for another."""

    waves: tuple[tuple[PlannedRun, ...], ...]

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All of them, in the order of strategies within lanes."""
        return tuple(run for wave in self.waves for run in wave)


def plan_runs(axes: SweepAxes, config: Path, output: Path, extra: Sequence[str] = ()) -> SweepPlan:
    """Every strategy and ceiling in every lane; leaders first, then those that follow them.

    Raises:
        ConfigError: nothing to run, or a strategy twice.
    """
    names = [*axes.strategies, *axes.ceilings]
    if not axes.strategies or len(set(names)) != len(names) or not axes.lanes:
        raise ConfigError("a sweep needs strategies, each once, and at least one order and seed.")
    waves: tuple[list[PlannedRun], ...] = ([], [], [])
    for lane in axes.lanes:
        for strategy in names:
            follows, shared = _leader_of(strategy, names)
            run = PlannedRun(
                strategy,
                lane.order,
                lane.seed,
                output.as_posix(),
                lane.name_of(strategy),
                ("--config", str(config), *_arguments(strategy, lane, output), *extra),
                leader=lane.name_of(follows) if follows else "",
                shared=shared,
            )
            waves[_wave(strategy, follows, names)].append(run)
    return SweepPlan(tuple(tuple(wave) for wave in waves if wave))


def _leader_of(strategy: str, names: Sequence[str]) -> tuple[str, int]:
    """Whose tasks a strategy takes over, and how many."""
    if strategy == "merge_at_end" and "independent" in names:
        return "independent", sys.maxsize
    if strategy in (names[0], "joint"):
        return "", 0
    return names[0], 1


def _wave(strategy: str, follows: str, names: Sequence[str]) -> int:
    if not follows:
        return 0
    return 2 if strategy == "merge_at_end" and follows != names[0] else 1


def _arguments(strategy: str, lane: Lane, output: Path) -> list[str]:
    arguments = ["--strategy", strategy, "--seed", str(lane.seed)]
    arguments += [] if lane.order is None else ["--order_seed", str(lane.order)]
    arguments += ["--output_dir", output.as_posix(), "--output_name", lane.name_of(strategy)]
    return [*arguments, "--evaluate"]  # nothing: the sweep scores all runs together
