"""What a parent must fit: one rule for our trainer, sd-scripts and every tool.

A chain runs on one base, named by the hash of its weights; a parent that does not know its base
(sd-scripts wrote "", NOFILE or IsADirectory, or nobody wrote anything) is taken as it is. It goes
on with the strategy of its last task and the same arguments, in any order; how a fresh A is drawn
(`init=`) is each task's own matter. Task names are told apart along the chain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lcp_plugin.errors import LcpError, LineageError, Page, explaining
from lcp_plugin.formats.lineage import known_hash
from lcp_plugin.sdxl.base_weights import identify_sum, pair_multipliers
from lcp_plugin.sdxl.load import BaseId, identify_base
from lcp_plugin.store.task_folder import Parent


def check_base(source: str, parent: Parent, base: BaseId | None) -> None:
    """Raises LineageError where both bases are known and differ."""
    recorded = known_hash(parent.base_hash or "")
    if recorded and base is not None and base.hash != recorded:
        raise LineageError(
            f"{source} was trained on base '{parent.base_name}' ({recorded[:10]}), "
            f"this run uses {base.short}. Chain runs on one base."
        )


def without_init(args: Sequence[str]) -> tuple[str, ...]:
    """A strategy's arguments but for how a fresh A is drawn, sorted."""
    return tuple(sorted(arg for arg in args if not arg.startswith("init=")))


def fit_strategy(
    source: str, parent: Parent, strategy: tuple[str, Sequence[str]], allow: bool, option: str
) -> Parent:
    """The parent as this strategy may go on from it: its state stays only where both are the same.

    Args:
        strategy: name and arguments of the task to come.
        allow: another strategy was asked for.  option: what asks for it, for the message.
    Raises:
        LineageError: another strategy, or other arguments, and nobody asked for them.
    """
    name, args = strategy
    same = parent.strategy == name and without_init(parent.strategy_args) == without_init(args)
    if parent.strategy is not None and not same and not allow:
        theirs = " ".join([parent.strategy, *parent.strategy_args])
        with explaining(Page.STRATEGY_CHANGE):
            raise LineageError(
                f"{source} was made with strategy {theirs}, this run uses "
                f"{' '.join([name, *args])}; use the same, or say {option}."
            )
    return parent if same else replace(parent, state={})


def tell_apart(parent: Parent, names: Collection[str]) -> Parent:
    """The parent, its foreign file's own name changed where a new task bears it: that name was read
    off the file, nobody gave it to a task.
    """
    if not parent.foreign:
        return parent
    records = []
    for record in parent.carry.tasks:
        name = record.name
        while name in names:
            name = f"{name}_before"
        records.append(replace(record, name=name))
    return replace(parent, carry=replace(parent.carry, tasks=tuple(records)))


def check_name(name: str, parent: Parent, advice: str = "give it another name") -> None:
    """Raises LineageError for a task whose name another task of the chain has."""
    if name in {record.name for record in parent.carry.tasks}:
        raise LineageError(f"task '{name}' is already in the chain that --prev names; {advice}.")


def identify_given(args: Any) -> BaseId | None:
    """The base of sd-scripts' own options, base_weights included; None where it cannot be told."""
    name = getattr(args, "pretrained_model_name_or_path", None)
    if not name:
        return None
    files: Sequence[str] = getattr(args, "base_weights", None) or ()
    multipliers: Sequence[float] = getattr(args, "base_weights_multiplier", None) or ()
    try:
        return identify_sum(identify_base(name), pair_multipliers(files, multipliers))
    except LcpError:
        return None
