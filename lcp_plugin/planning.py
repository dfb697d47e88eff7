"""What a run will do, decided and checked before a model is loaded.

New, resumed or continued; on which base and parent; which tasks, in which order and under which
numbers.
"""

from __future__ import annotations

import platform
import secrets
import shutil
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
from lcp_plugin.data.check import check_images
from lcp_plugin.errors import ConfigError, LineageError, ResumeError
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.registry import create_strategy, describe_arguments, find
from lcp_plugin.sdxl.base_weights import identify_with
from lcp_plugin.sdxl.load import BaseId, check_vae, identify_base
from lcp_plugin.starting import check_start
from lcp_plugin.store import Parent, RunStore, hash_carry, read_parent
from lcp_plugin.tasks import Task, fill_prompt, shuffle_tasks
from lcp_plugin.trainer_state import read_manifest

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
    store = RunStore(Path(options.output_dir or "output"), options.output_name or "last")
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = identify_with(identify_base(options.pretrained_model_name_or_path), options)
    known = store.read_run()
    if options.overwrite and known is not None and known["status"] == "finished":
        shutil.rmtree(store.root)
        store.deliverable.unlink(missing_ok=True)
        known = None
    if known is None:
        check_nothing_is_lost(store, options)
        parent = choose_parent(options, strategy, base)
        seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    else:
        check_unchanged(known, config, base)
        parent, seed = store.read_parent(), int(known["seed"])
    check_start(options, parent, is_new=parent.source is None)
    tasks, configs = order_tasks(config, parent, strategy)
    if known is not None and known["status"] == "finished" and len(known["tasks"]) == len(tasks):
        raise ResumeError(
            f"run '{store.name}' is finished: {store.deliverable}. To learn more append [[tasks]] "
            f"to "
            "its config; to start over use --overwrite; else choose another --output_name."
        )
    check_images(configs[task.name] for task in tasks[len(store.folders()) :])
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


def check_before_run(config: RunConfig) -> None:
    """What a run would find wrong before it loads a model, for a dry run. Raises LcpError."""
    options = config.options
    check_places(options)
    check_vae(options.vae)
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


def without_init(args: Sequence[str]) -> tuple[str, ...]:
    """A strategy's arguments but for how a fresh A is drawn, which is each task's own matter."""
    return tuple(arg for arg in args if not arg.startswith("init="))


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


def check_nothing_is_lost(store: RunStore, options: Options) -> None:
    """A new run must not write over files that are there."""
    for path in (store.deliverable, *store.root.glob("*/lineage.json")):
        if path.exists():
            if options.overwrite:
                shutil.rmtree(store.root, ignore_errors=True)
                store.deliverable.unlink(missing_ok=True)
                return
            raise ResumeError(
                f"{path} exists already; choose another --output_name, or --overwrite it."
            )


def choose_parent(options: Options, strategy: Strategy, base: BaseId) -> Parent:
    """What --prev names, checked to fit base and strategy; an empty carry without it."""
    if not options.prev:
        return Parent()
    parent = read_parent(Path(options.prev).expanduser(), create_strategy)
    if parent.base_hash is not None and parent.base_hash != base.hash:
        raise LineageError(
            f"{options.prev} was trained on base '{parent.base_name}' ({parent.base_hash[:10]}), "
            f"this run uses {base.short}. Chain runs on one base."
        )
    same = parent.strategy == strategy.name
    same = same and without_init(parent.strategy_args) == without_init(options.strategy_args)
    if parent.strategy is not None and not same and not options.allow_strategy_change:
        theirs = " ".join([parent.strategy, *parent.strategy_args])
        ours = " ".join([strategy.name, *options.strategy_args])
        raise LineageError(
            f"{options.prev} was made with strategy {theirs}, this run uses {ours}; "
            "use the same, or say --allow_strategy_change."
        )
    return parent if same else replace(parent, state={})


def check_unchanged(known: Mapping[str, Any], config: RunConfig, base: BaseId) -> None:
    """A run is resumed with the settings it was started with; tasks may be appended.

    Raises:
        ResumeError: naming the keys that differ.
    """
    old, new = dict(known["fingerprint"]), config.fingerprint()
    old_tasks, new_tasks = old.pop("tasks"), list(new["tasks"])
    new = {k: v for k, v in new.items() if k != "tasks"}
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    if known["base"]["hash"] != base.hash:
        changed.append("the base's weights")
    if new_tasks[: len(old_tasks)] != old_tasks:
        changed.append("tasks (only appending is possible)")
    elif len(new_tasks) != len(old_tasks) and config.options.order_seed is not None:
        changed.append("tasks (order_seed would shuffle the learned ones anew)")
    if changed:
        details = ", ".join(
            f"{k} (was {old[k]!r}, is {new[k]!r})" if k in old and k in new else k for k in changed
        )
        raise ResumeError(
            f"run '{known['name']}' was started with other settings: {details}. Restore them, "
            f"choose "
            "another --output_name, or --overwrite."
        )


def order_tasks(
    config: RunConfig, parent: Parent, strategy: Strategy
) -> tuple[tuple[Task, ...], dict[str, TaskConfig]]:
    """The run's tasks, numbered along the chain; one task for a strategy that joins them."""
    learned = max((r.index for r in parent.carry.tasks), default=0)
    taken = {record.name for record in parent.carry.tasks}
    for task in config.tasks:
        if task.name in taken:
            raise LineageError(
                f"task '{task.name}' is already in the chain that --prev names; give it another "
                f"name."
            )
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
