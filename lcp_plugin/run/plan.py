"""What a run will do, decided and checked before a model is loaded.

New, resumed or continued; on which base and parent; which tasks, in which order and under which
numbers.
"""

from __future__ import annotations

import platform
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lcp_plugin import __version__
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.logs import SECRETS
from lcp_plugin.config.options import Options
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.examples import check_images
from lcp_plugin.errors import ConfigError, FinishedError
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.registry import create_strategy, describe_arguments, find
from lcp_plugin.run.chaining import check_base, check_name, fit_strategy, tell_apart
from lcp_plugin.run.network_weights import check_start
from lcp_plugin.run.parent_prompts import note_prompts
from lcp_plugin.run.restarting import take_up
from lcp_plugin.sdxl.base_weights import identify_with
from lcp_plugin.sdxl.load import BaseId, check_vae, identify_base
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.store.parents import read_parent
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import Task, fill_prompt, shuffle_tasks
from lcp_plugin.training.optimizers import OptimizerChoice, check_optimizer
from lcp_plugin.training.state import read_manifest

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes")


@dataclass
class Plan:
    """Everything that a run holds besides the live model."""

    config: RunConfig
    store: RunStore
    strategy: Strategy
    base: BaseId
    parent: Parent
    tasks: tuple[Task, ...]
    configs: Mapping[str, TaskConfig]  # task name -> its configuration
    seed: int
    facts: dict[str, Any]  # run.json

    @property
    def options(self) -> Options:
        """The run's options."""
        return self.config.options

    @property
    def name(self) -> str:
        """output_name."""
        return self.store.name


def make_plan(config: RunConfig) -> Plan:
    """Everything that can be known before a model is loaded, checked.

    Raises:
        LcpError: one line; nothing was changed on disk, but for --overwrite.
    """
    options = config.options
    check_places(options)
    check_vae(options.vae)
    check_optimizers(config)
    store = RunStore(Path(options.output_dir or "output"), options.output_name or "last")
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = identify_with(identify_base(options.pretrained_model_name_or_path), options)
    found = take_up(store, config, base)
    known = None if found is None else found[0]
    if found is None:
        parent = choose_parent(options, strategy, base)
        parent = tell_apart(parent, [task.name for task in config.tasks])
        parent = note_prompts(parent, options.prev_prompts, strategy)
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
    facts = known or {"format": 1, "ended": [], "said": [], "base_sampled": False, "sessions": []}
    plan = Plan(config, store, strategy, base, parent, tasks, configs, seed, facts)
    facts.update(describe_plan(plan))
    return plan


def check_places(options: Options) -> None:
    """Raises ConfigError for an output_dir or cache_dir that cannot be made or written to."""
    for key in ("output_dir", "cache_dir"):
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
    """Raises ConfigError for optimizer_args, of the run or of one task, that do not fit."""
    every = [config.options, *(task.options for task in config.tasks)]
    for choice in dict.fromkeys(OptimizerChoice.of(options) for options in every):
        check_optimizer(choice)


def check_before_run(config: RunConfig) -> None:
    """What a run would find wrong before it loads a model, for a dry run. Raises LcpError."""
    options = config.options
    check_places(options)
    check_vae(options.vae)
    check_optimizers(config)
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = identify_with(identify_base(options.pretrained_model_name_or_path), options)
    parent = choose_parent(options, strategy, base)
    check_start(options, parent, is_new=True)
    order_tasks(config, parent, strategy)


def settle_init(config: RunConfig) -> RunConfig:
    """The config with lora_init among the strategy's arguments, if the strategy takes one and none
    is given there: so files record it, and replaying finds it again.
    """
    options = config.options
    init = options.lora_init
    if init is None or any(arg.startswith("init=") for arg in options.strategy_args):
        return config
    accepted = describe_arguments(find(Strategy, options.strategy))
    if "init" not in accepted:
        text = f"lora_init = {init} has no effect: {options.strategy} starts A its own way."
        return replace(config, notices=(*config.notices, text))
    args = (*options.strategy_args, f"init={init}")
    return replace(config, options=replace(options, strategy_args=args))


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


def follow_plan(config: RunConfig, parent: Parent, seed: int, facts: dict[str, Any]) -> Plan:
    """The plan on another process than rank 0: nothing is read from or written to its folder."""
    options = config.options
    strategy = create_strategy(options.strategy, options.strategy_args)
    tasks, configs = order_tasks(config, parent, strategy)
    store = RunStore(Path(options.output_dir or "output"), options.output_name or "last")
    base = BaseId(**facts["base"])
    return Plan(config, store, strategy, base, parent, tasks, configs, seed, facts)


def choose_parent(options: Options, strategy: Strategy, base: BaseId) -> Parent:
    """What --prev names, checked to fit base and strategy; an empty carry without it."""
    if not options.prev:
        return Parent()
    parent = read_parent(Path(options.prev).expanduser(), create_strategy)
    check_base(options.prev, parent, base)
    mine = (strategy.name, options.strategy_args)
    allow = options.allow_strategy_change
    return fit_strategy(options.prev, parent, mine, allow, "--allow_strategy_change")


def order_tasks(
    config: RunConfig, parent: Parent, strategy: Strategy
) -> tuple[tuple[Task, ...], dict[str, TaskConfig]]:
    """The run's tasks, numbered along the chain; one task for a strategy that joins them."""
    learned = max((r.index for r in parent.carry.tasks), default=0)
    for task in config.tasks:
        check_name(task.name, parent)
    tasks = tuple(make_task(learned + 1 + i, c) for i, c in enumerate(config.tasks))
    configs = {c.name: c for c in config.tasks}
    tasks = shuffle_tasks(tasks, config.options.order_seed)
    if strategy.joins_tasks and len(tasks) > 1:
        joint, joint_config = join_tasks(tasks, config)
        return (joint,), {joint.name: joint_config}
    return tasks, configs


def make_task(index: int, config: TaskConfig) -> Task:
    """The value that strategies see."""
    return Task(
        index=index,
        name=config.name,
        kind=config.kind,
        concept=config.concept,
        prompts=config.eval_prompts,
        train_prompt=fill_prompt(config.train_prompt, config.concept, "{class_name}"),
        images=tuple(str(s.image_dir) for d in config.datasets for s in d.subsets),
        overrides=dict(config.overrides),
    )


def join_tasks(tasks: Sequence[Task], config: RunConfig) -> tuple[Task, TaskConfig]:
    """One task with everyone's images and the sum of their steps."""
    parts = {c.name: c for c in config.tasks}
    steps = sum(parts[t.name].options.max_train_steps for t in tasks)
    task = Task(
        index=tasks[-1].index,
        name="joint",
        kind=tasks[0].kind,
        concept="joint",
        prompts=(),
        parts=tuple(tasks),
    )
    first = config.tasks[0]
    return task, TaskConfig(
        name="joint",
        kind=first.kind,
        concept="joint",
        train_prompt="",
        eval_prompts=(),
        datasets=tuple(d for c in config.tasks for d in c.datasets),
        options=replace(config.options, max_train_steps=steps),
        has_tables=any(c.has_tables for c in config.tasks),
    )


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What run.json says of a run before it begins."""
    return {
        "name": plan.name,
        "fingerprint": plan.config.fingerprint(),
        "options": describe_options(plan.options),
        "tasks": [record.to_json() for task in plan.tasks for record in task.records()],
        "images": list_image_folders(plan.config),
        "strategy": {"name": plan.strategy.name, "args": list(plan.options.strategy_args)},
        "base": asdict(plan.base),
        "parent": {"source": plan.parent.source, "hash": plan.parent.hash},
        "seed": plan.seed,
        "order_seed": plan.options.order_seed,
        "versions": versions(),
        "session": secrets.token_hex(4),
        "text_delta": text_delta_hash(plan.parent.carry),
    }


def list_image_folders(config: RunConfig) -> dict[str, list[str]]:
    """Task name -> the folders of its training images, absolute: the references of its scores."""
    return {
        task.name: [
            str(subset.image_dir.absolute())
            for dataset in task.datasets
            for subset in dataset.subsets
            if not subset.is_reg
        ]
        for task in config.tasks
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Options that differ from their defaults, JSON-able; keys and tokens stay out."""
    plain = Options()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(options).items()
        if value != getattr(plain, key) and key not in SECRETS
    }


def text_delta_hash(carry: Carry) -> str:
    """Names the text encoders' delta, for caches of their outputs: "none" where there is none."""
    names = [name for name in carry.total if not name.startswith("unet.")]
    return hash_carry(Carry(carry.total.restrict(names))) if names else "none"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"lcp_plugin": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def stamp(seconds: float) -> str:
    """UTC, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
