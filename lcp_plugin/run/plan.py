"""What a run will do, decided and checked before a model is loaded.

New, resumed or continued; on which base and parent; which tasks, in which order, and how they are
numbered along the chain.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.logs import tracker_settings
from lcp_plugin.config.options import Options
from lcp_plugin.config.rates import NOTHING_TRAINS, trains_anything
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.examples import check_images
from lcp_plugin.errors import ConfigError, FinishedError, Page, StrategyError, explaining
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.hooks import Observer, Strategy
from lcp_plugin.registry import create_strategy, find
from lcp_plugin.run.chaining import check_base, fit_strategy, tell_apart
from lcp_plugin.run.network_weights import check_start, read_network_weights
from lcp_plugin.run.parent_prompts import check_no_prompts, note_prompts
from lcp_plugin.run.record import (
    describe_command,
    describe_options,
    describe_parent,
    list_image_folders,
    versions,
)
from lcp_plugin.run.restarting import check_taken, take_up
from lcp_plugin.run.tasks import order_tasks
from lcp_plugin.run.to_draw import count_images
from lcp_plugin.sdxl.base_shapes import check_loras, read_shapes
from lcp_plugin.sdxl.base_weights import identify_with, list_base_weights
from lcp_plugin.sdxl.load import BaseId, check_vae, identify_base
from lcp_plugin.store.parents import read_parent
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import Task
from lcp_plugin.training.optimizers import OptimizerChoice, check_optimizer
from lcp_plugin.training.processes import Processes, share_carry, share_decision
from lcp_plugin.training.schedules import RateSchedule, check_schedule
from lcp_plugin.training.state import read_manifest


@dataclass(frozen=True)
class RunPlan:
    """What a run is, all of it decided: a value."""

    config: RunConfig
    store: RunStore
    strategy: Strategy
    base_id: BaseId
    parent: Parent
    tasks: tuple[Task, ...]
    configs: Mapping[str, TaskConfig]  # task name -> its configuration
    seed: int
    facts: Mapping[str, Any]  # run.json, as the run begins

    @property
    def options(self) -> Options:
        """The run's options."""
        return self.config.options

    @property
    def name(self) -> str:
        """output_name."""
        return self.store.name

    def count_steps(self, task: Task) -> int | None:
        """Optimizer steps of a task; None where epochs decide and images must be counted."""
        options = self.configs[task.name].options
        return None if options.max_train_epochs else options.max_train_steps


def make_plan(config: RunConfig) -> RunPlan:
    """Everything that can be known before a model is loaded, checked.

    Raises:
        LcpError: one line; nothing was changed on disk, but for --overwrite.
    """
    options = config.options
    check_settings(config)
    store = store_of(options)
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = identify_with(identify_base(options.pretrained_model_name_or_path), options)
    check_weights(options)
    found = take_up(store, config, base)
    known = None if found is None else found[0]
    if found is None:
        parent = choose_parent(config, strategy, base)
        check_start(options, parent, is_new=True)
        seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    else:
        parent, seed = found[1], int(found[0]["seed"])
    tasks, configs = order_tasks(config, parent, strategy)
    if known is not None and known["status"] == "finished" and len(known["tasks"]) == len(tasks):
        raise FinishedError(
            f"run '{store.name}' is finished: {store.deliverable}. To learn more append [[tasks]] "
            "to its config; to start over use --overwrite; else choose another --output_name."
        )
    check_images(d for task in tasks[len(store.folders()) :] for d in configs[task.name].datasets)
    check_resume(options, tasks[len(store.folders()) :])
    fresh = {"format": 1, "ended": [], "said": [], "base_sampled": False, "sessions": []}
    facts = {**fresh, **(known or {})}
    plan = RunPlan(config, store, strategy, base, parent, tasks, configs, seed, facts)
    return replace(plan, facts={**facts, **describe_beginning(plan)})


def store_of(options: Options) -> RunStore:
    """Where a run's files go."""
    return RunStore(Path(options.output_dir or "output"), options.output_name or "last")


def check_settings(config: RunConfig) -> None:
    """What needs neither base nor parent to be found wrong. Raises LcpError."""
    options = config.options
    check_places(options)
    tracker_settings(options)
    check_vae(options.vae)
    check_optimizers(config)
    for name in options.observer:
        with explaining(Page.OBSERVERS, StrategyError):
            find(Observer, name)
    for task in config.tasks:
        if not trains_anything(task.options):
            raise ConfigError(NOTHING_TRAINS)


def check_places(options: Options) -> None:
    """Raises ConfigError for a folder that cannot be made or written to."""
    for key in ("output_dir", "cache_dir", *(["logging_dir"] if options.log_with else [])):
        if not (name := getattr(options, key)):
            continue
        found = Path(name).expanduser().absolute()
        while not found.exists() and found != found.parent:
            found = found.parent
        if not found.is_dir():
            reason = f"'{found}' is a file, not a folder"
        else:
            try:
                with tempfile.TemporaryFile(dir=found):
                    continue
            except OSError:
                reason = f"nothing can be written in '{found}'"
        raise ConfigError(f"{key} = {name!r} cannot be made: {reason}; choose another folder.")


def check_optimizers(config: RunConfig) -> None:
    """Raises ConfigError for an optimizer's or a schedule's arguments, of the run or of one task,
    that do not fit.
    """
    every = [config.options, *(task.options for task in config.tasks)]
    for schedule, steps in dict.fromkeys((RateSchedule.of(o), _least_steps(o)) for o in every):
        check_schedule(schedule, steps)
    for choice in dict.fromkeys(OptimizerChoice.of(options) for options in every):
        check_optimizer(choice)


def _least_steps(options: Options) -> int:
    """Steps that a task surely has; those of epochs are known with its images."""
    return options.max_train_epochs or options.max_train_steps


def check_weights(options: Options, has_base: bool = True) -> None:
    """Raises LcpError for base_weights and network_weights that are no LoRA of the base."""
    files = {f"base_weights {path}": read_lora(path) for path, _ in list_base_weights(options)}
    start = {f"network_weights {options.network_weights}": read_network_weights(options)}
    if has_base:
        check_loras(options.pretrained_model_name_or_path, {**files, **start})


def check_before_run(config: RunConfig, has_base: bool = True) -> None:
    """What a run would find wrong before it loads a model, for a dry run. Raises LcpError.

    `has_base`: the base is on this machine; else all is checked that can be told without it.
    """
    options = config.options
    check_settings(config)
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = None
    if has_base:
        base = identify_with(identify_base(options.pretrained_model_name_or_path), options)
        check_taken(store_of(options), config, base)
    check_weights(options, has_base)
    parent = choose_parent(config, strategy, base)
    check_start(options, parent, is_new=True)
    order_tasks(config, parent, strategy)


def check_resume(options: Options, tasks: Sequence[Task]) -> None:
    """Raises ConfigError unless the state that --resume names is of a task still to be learned."""
    if not options.resume:
        return
    manifest = read_manifest(Path(options.resume))
    if int(manifest["task_index"]) not in [task.index for task in tasks]:
        raise ConfigError(
            f"resume = '{options.resume}' is a state of task {manifest['task_index']} "
            f"({manifest.get('task', 'unnamed')}), which this run does not train any more; leave "
            "it out, or choose another --output_name."
        )


def join_plan(config: RunConfig, accelerator: Processes) -> RunPlan:
    """The plan that rank 0 makes of what it finds on disk, on every process."""
    if accelerator.num_processes == 1:
        return make_plan(config)
    mine: list[RunPlan] = []

    def decide() -> tuple[int, Mapping[str, Any]]:
        mine.append(make_plan(config))
        return mine[0].seed, mine[0].facts

    seed, facts = share_decision(accelerator, decide)
    carry = share_carry(accelerator, lambda: mine[0].parent.carry)
    return mine[0] if mine else follow_plan(config, Parent(carry=carry), seed, facts)


def follow_plan(config: RunConfig, parent: Parent, seed: int, facts: Mapping[str, Any]) -> RunPlan:
    """The plan on another process than rank 0: nothing is read from or written to its folder."""
    options = config.options
    strategy = create_strategy(options.strategy, options.strategy_args)
    tasks, configs = order_tasks(config, parent, strategy)
    store = store_of(options)
    base = BaseId(**facts["base"])
    return RunPlan(config, store, strategy, base, parent, tasks, configs, seed, facts)


def choose_parent(config: RunConfig, strategy: Strategy, base: BaseId | None) -> Parent:
    """What --prev names, checked to fit base and strategy, with prompts of what it knows where the
    strategy rehearses it; an empty carry without it.
    """
    options = config.options
    if not options.prev:
        check_no_prompts(options.prev_prompts)
        return Parent()
    parent = read_parent(Path(options.prev).expanduser())
    check_base(options.prev, parent, base)
    if base is not None:
        _check_widths(options, parent)
    mine = (strategy.name, options.strategy_args)
    allow = options.allow_strategy_change
    parent = fit_strategy(options.prev, parent, mine, allow, "--allow_strategy_change")
    parent = tell_apart(parent, [task.name for task in config.tasks])
    with explaining(Page.RECALL, ConfigError):
        return note_prompts(parent, options.prev_prompts, strategy)


def _check_widths(options: Options, parent: Parent) -> None:
    """Raises LineageError for a parent whose layers have other widths than the base's."""
    shapes, carry = read_shapes(options.pretrained_model_name_or_path), parent.carry
    shapes.check(f"--prev {options.prev}", carry.delta, carry.biases)
    shapes.check(f"--prev {options.prev}", carry.adapter or {})


def describe_beginning(plan: RunPlan) -> dict[str, Any]:
    """What run.json says of a run before it begins."""
    records = [record for task in plan.tasks for record in task.records()]
    return {
        "name": plan.name,
        "command": describe_command(plan.config.arguments),
        "fingerprint": plan.config.fingerprint(),
        "options": describe_options(plan.options),
        "tasks": [record.to_json() for record in records],
        "steps": {task.name: plan.count_steps(task) for task in plan.tasks},
        "to_draw": count_images(plan.options, records, plan.parent),
        "images": list_image_folders(plan.config),
        "strategy": {"name": plan.strategy.name, "args": list(plan.options.strategy_args)},
        "base": asdict(plan.base_id),
        "seed": plan.seed,
        "order_seed": plan.options.order_seed,
        "versions": versions(),
        "session": secrets.token_hex(4),
        **describe_parent(plan.parent),
    }
