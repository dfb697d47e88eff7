"""What a sweep runs: strategies x orders x seeds, and who takes over whose first tasks.

A lane is one (order, seed): the same tasks in the same order from the same seed. Its first run
leads; the others take over the leader's first task, because a first task is trained alike under
every strategy that starts it alike. `merge_at_end` takes over all tasks of `independent`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.scores import CEILINGS
from lcp_plugin.store.run_folder import RunStore

UNSCORED = ("--evaluate",)  # nothing: the sweep scores all runs together


def slug_of(strategy: str) -> str:
    """A strategy with its arguments as part of a file name: `recall of=naive`, recall_of_naive."""
    return re.sub(r"[^\w.-]+", "_", strategy).strip("_")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    strategy: str  # its name, and its arguments behind it
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


@dataclass(frozen=True)
class Lane:
    """One order of the tasks, trained from one seed."""

    order_seed: int | None  # None: the config's order
    seed: int

    @property
    def suffix(self) -> str:
        """Of its runs' names."""
        return f"{'' if self.order_seed is None else f'_order{self.order_seed}'}_seed{self.seed}"


def list_lanes(orders: Sequence[int | None], seeds: Sequence[int]) -> list[Lane]:
    """Every order with every seed."""
    return [Lane(order, seed) for order in orders for seed in seeds]


def plan_runs(
    config: Path,
    strategies: Sequence[str],
    ceilings: Sequence[str],
    lanes: Sequence[Lane],
    output: Path,
    extra: Sequence[str] = (),
) -> SweepPlan:
    """Every strategy and ceiling in every lane; leaders first, then those that follow them.

    Raises:
        ConfigError: nothing to run, a strategy twice, or an unknown ceiling.
    """
    names = [*strategies, *ceilings]
    if not strategies or len({slug_of(name) for name in names}) != len(names) or not lanes:
        raise ConfigError("a sweep needs strategies, each once, and at least one order and seed.")
    unknown = [name for name in ceilings if name not in CEILINGS]
    if unknown:
        raise ConfigError(f"--ceilings {unknown[0]}: there are {', '.join(CEILINGS)}.")
    waves: tuple[list[PlannedRun], ...] = ([], [], [])
    for lane in lanes:
        for strategy in names:
            follows, shared = _leader_of(strategy, names)
            name = f"{slug_of(strategy)}{lane.suffix}"
            place = ["--output_dir", output.as_posix(), "--output_name", name]
            run = PlannedRun(
                strategy,
                lane.order_seed,
                lane.seed,
                output.as_posix(),
                name,
                (*_learning(config, strategy, lane), *place, *UNSCORED, *extra),
                leader=f"{slug_of(follows)}{lane.suffix}" if follows else "",
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


def _learning(config: Path, strategy: str, lane: Lane) -> list[str]:
    """What of a training command decides what is learned."""
    name, *given = strategy.split()
    arguments = ["--config", str(config), "--strategy", name, "--seed", str(lane.seed)]
    arguments += ["--strategy_args", *given] if given else []
    order = lane.order_seed
    return arguments if order is None else [*arguments, "--order_seed", str(order)]
