"""A run: learn a sequence of tasks, one boundary after another. Read `Run.learn` first.

Order of things on disk: the task folder (lineage.json last), then the deliverable, samples and
run.json, then
on_task_end is noted as done. A run killed anywhere picks up behind the last whole one of these.
"""

from __future__ import annotations

import logging
import platform
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcp_plugin import __version__
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.options import Options
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.check import check_images
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import DiskError, LcpError, LineageError, ResumeError
from lcp_plugin.files import cache_folder, require_free_space
from lcp_plugin.hooks import Carry, Observer, Strategy
from lcp_plugin.observers import Console, JsonLines, Trackers
from lcp_plugin.parallel import (
    create_accelerator,
    share_carry,
    share_decision,
    share_object,
    share_start,
    share_tensors,
)
from lcp_plugin.registry import create, create_strategy
from lcp_plugin.samples import BASE_STAGE, SamplePlan, draw_grid, sample_stage
from lcp_plugin.sdxl.conditioning import PromptBank
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.load import BaseId, identify_base, load_pipeline, native_resolution
from lcp_plugin.sdxl.sample import sample_images, starting_latents
from lcp_plugin.store import (
    Parent,
    RunStore,
    TaskFolder,
    deliverable_header,
    hash_carry,
    read_parent,
)
from lcp_plugin.tasks import Task, TaskRecord, fill_prompt, shuffle_tasks
from lcp_plugin.trainer import Trained, Trainer, weight_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes")
DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """Implements `hooks.RunView`; everything that a run holds besides the live model."""

    config: RunConfig
    store: RunStore
    strategy: Strategy
    base: BaseId
    parent: Parent
    tasks: tuple[Task, ...]
    configs: Mapping[str, TaskConfig]  # task name -> its configuration
    seed: int
    facts: dict[str, Any]  # run.json
    device: str = "cpu"
    observers: list[Observer] = field(default_factory=list)
    accelerator: Any = None
    trainer: Trainer | None = None
    bank: PromptBank = field(default_factory=PromptBank)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def options(self) -> Options:
        """The run's options."""
        return self.config.options

    @property
    def name(self) -> str:
        """output_name."""
        return self.store.name

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.store.root

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    # ------------------------------------------------------------------------------ the run

    def learn(self) -> Carry:
        """Every task that is not yet on disk, in order; what is on disk but not delivered,
        first.
        """
        carry = share_carry(self.accelerator, self.restore)
        self.share_strategy()
        learned = share_object(self.accelerator, len(self.store.folders()))
        if self.is_main:
            self.sample_base()
            self.finish_boundaries()
        for task in self.tasks[learned:]:
            carry = self.learn_task(task, carry)
            if self.is_main:
                self.finish_boundaries()
            self.wait()
        return carry

    def share_strategy(self) -> None:
        """The strategy's state on every process: step hooks run everywhere."""
        if self.accelerator.num_processes > 1:
            state = share_tensors(self.accelerator, self.strategy.state_dict())
            if state and not self.is_main:
                self.strategy.load_state_dict(state)

    def learn_task(self, task: Task, carry: Carry) -> Carry:
        """begin_task, training, end_task, and the task folder complete on disk."""
        assert self.trainer is not None
        began = time.time()
        options, data = self.prepare_data(task)
        spec = self.trainer.spec(task, options)
        start = share_start(self.accelerator, lambda: self.strategy.begin_task(task, carry, spec))
        self.tell("on_task_begin", task)
        trained = self.train(task, options, data, start, carry)
        after = share_carry(
            self.accelerator, lambda: self.end_task(task, carry, options, data, trained)
        )
        if self.is_main:
            facts = self.describe_task(options, data, trained, began)
            keep = self.options.keep_carries
            self.store.save_task(task, trained.adapter, after, self.strategy, facts, keep)
            self.store.clear_state()
        self.share_strategy()
        return after

    def restore(self) -> Carry:
        """The carry to go on from, and the strategy's state behind it."""
        folders = self.store.folders()
        parent = folders[-1].parent() if folders else self.parent
        if parent.strategy == self.strategy.name and parent.state:
            self.strategy.load_state_dict(parent.state)
        return parent.carry

    def prepare_data(self, task: Task) -> tuple[Options, TaskData]:
        """The task's options, its images read and encoded."""
        assert self.trainer is not None
        trainer, config = self.trainer, self.configs[task.name]
        native = native_resolution(trainer.pipeline)
        cache = Path(config.options.cache_dir) if config.options.cache_dir else cache_folder()
        data = TaskData(config, self.seed, task.index, (native, native), cache / "encoded")
        for notice in data.notices:
            self.say(notice)
        vae_key = f"{self.base.hash}:{config.options.vae or 'own'}:mean"
        text_key = f"{self.base.hash}:{self.facts['text_delta']}"
        # trained text encoders are never cached, so the parent's delta on them is all that counts
        data.prepare(trainer.encode_images, trainer.encode_prompts, vae_key, text_key)
        return config.options, data

    def train(
        self, task: Task, options: Options, data: TaskData, start: Any, carry: Carry
    ) -> Trained:
        """The task's training, watched by the observers."""
        assert self.trainer is not None
        return self.trainer.train_task(
            task,
            options,
            data,
            start,
            carry.total,
            self.strategy,
            self.store,
            on_step=lambda report: self.tell("on_step_end", report),
            sampler=self.draw,
            observer_state=self.observer_states,
        )

    def end_task(
        self, task: Task, carry: Carry, options: Options, data: TaskData, trained: Trained
    ) -> Carry:
        """The strategy's carry, with what was learned on noted in its newest record."""
        after = self.strategy.end_task(task, carry, trained.adapter)
        if len(after.tasks) != len(carry.tasks) + len(task.records()):
            raise LineageError(
                f"strategy {self.strategy.name} returned a carry with {len(after.tasks)} task "
                f"records "
                f"after task {task.index}; use carry.after(task, ...), which keeps them."
            )
        return after.noting(
            images=data.num_images,
            data=data.fingerprint,
            steps=trained.facts["steps"],
            rank=options.rank,
            alpha=options.alpha,
        )

    # ---------------------------------------------------------------------------- boundaries

    def finish_boundaries(self) -> None:
        """What follows a saved task: deliverable, samples, run.json, on_task_end; each once."""
        ended = set(self.facts["ended"])
        pending = [f for f in self.store.folders() if f.index not in ended]
        for folder in pending:
            carry = self.store.carry_after(folder.index, create_strategy)
            if folder is pending[-1]:
                self.deliver(carry)
            self.show(carry)
            images = self.sample(folder.path.name, folder.records)
            task = next(t for t in self.tasks if t.index == folder.index)
            self.tell("on_sample", task, images)
            self.tell("on_task_end", task, carry)
            self.facts["ended"].append(folder.index)
            self.write_facts(status="running")

    def deliver(self, carry: Carry) -> None:
        """The deliverable, unless the one on disk records this very carry."""
        if self.store.delivered_hash() == hash_carry(carry):
            return
        header = deliverable_header(
            carry,
            self.strategy.name,
            self.options.strategy_args,
            self.base.name,
            self.base.hash,
        )
        dtype = DTYPES[self.options.save_precision or "float"]
        self.store.write_deliverable(carry, header, dtype)

    def show(self, carry: Carry) -> None:
        """Puts the live model on W0 + carry.total, without an adapter."""
        assert self.trainer is not None
        self.trainer.adapted.detach()
        self.trainer.adapted.set_base(carry.total, self.options.carry_as, measure=False)
        self.trainer.adapted.eval()

    # ------------------------------------------------------------------------------- samples

    def sample_base(self) -> None:
        """Before the first task: what the model makes of every task's prompts as yet."""
        if (self.store.root / "samples" / BASE_STAGE).is_dir() and self.facts["base_sampled"]:
            return
        self.show(self.parent.carry)
        images = self.sample(BASE_STAGE, self.all_records())
        self.tell("on_sample", None, images)
        self.facts["base_sampled"] = True
        self.write_facts(status="running")

    def all_records(self) -> tuple[TaskRecord, ...]:
        """The parent's tasks and this run's."""
        own = tuple(record for task in self.tasks for record in task.records())
        return (*self.parent.carry.tasks, *own)

    def sample(self, stage: str, records: Sequence[TaskRecord]) -> dict[str, list[Image]]:
        """Images of the records at a stage, and the grid drawn anew; main process only."""
        if not self.is_main or self.options.samples_per_task == 0:
            return {}
        folder = self.store.root / "samples"
        plan = SamplePlan(self.options.samples_per_task, self.options.sample_seed)
        facts = {"stage": stage, "run": self.name, "base": self.base.hash}
        images = sample_stage(folder, stage, records, plan, self.draw, facts)
        stages = [(BASE_STAGE, "base")]
        stages += [(f.path.name, f"after {f.name}") for f in self.store.folders()]
        draw_grid(folder, self.all_records(), stages)
        return images

    def draw(self, prompts: Sequence[str], seed: int, distinct: int | None = None) -> list[Image]:
        """An image per prompt from the live model as it is.

        `distinct` starting latents are drawn from the seed (one per prompt if None), used in turn.
        """
        assert self.trainer is not None
        trainer, options = self.trainer, self.options
        if trainer.options.trains_text_encoders:
            self.bank.clear()  # they change from step to step
        with trainer.text_encoders():
            self.bank.add(trainer.pipeline, [*prompts, ""])
        width, height = options.resolution or (native_resolution(trainer.pipeline),) * 2
        count = distinct or len(prompts)
        latents = starting_latents(trainer.pipeline, count, (height, width), seed)
        latents = latents[[i % count for i in range(len(prompts))]]
        training = trainer.adapted.training
        trainer.adapted.eval()
        trainer.pipeline.vae.to(trainer.device)
        images = sample_images(
            trainer.pipeline,
            self.bank(prompts),
            self.bank([""]),
            latents,
            options.sample_steps,
            options.guidance_scale,
        )
        trainer.adapted.train(training)
        return images

    # --------------------------------------------------------------------------------- facts

    def describe_task(
        self, options: Options, data: TaskData, trained: Trained, began: float
    ) -> dict[str, Any]:
        """The facts of lineage.json besides records and hashes; everything that varies is in
        "session".
        """
        folders = self.store.folders()
        before = folders[-1].lineage["hashes"]["carry"] if folders else self.parent.hash
        return {
            "strategy": {"name": self.strategy.name, "args": list(self.options.strategy_args)},
            "base": asdict(self.base),
            "parent": {
                "hash": before,
                "source": folders[-1].path.name if folders else self.parent.source,
            },
            "seed": self.seed,
            "data": {"fingerprint": data.fingerprint, "images": data.num_images},
            "training": trained.facts,
            "options": describe_options(options),
            "versions": versions(),
            "session": {
                "id": self.facts["session"],
                "started_at": stamp(began),
                "finished_at": stamp(time.time()),
                "processes": self.accelerator.num_processes,
                "device": self.device,
            },
        }

    def write_facts(self, status: str) -> None:
        """run.json."""
        if self.is_main:
            self.facts["status"] = status
            self.facts["observers"] = self.observer_states()
            self.facts["deliverable"] = {
                "file": self.store.deliverable.name,
                "carry_hash": self.store.delivered_hash(),
            }
            self.store.write_run(self.facts)

    def observer_states(self) -> dict[str, Any]:
        """State of every observer that has some."""
        states = {f"{i}:{o.name}": o.state_dict() for i, o in enumerate(self.observers)}
        return {key: state for key, state in states.items() if state}

    def tell(self, hook: str, *args: Any) -> None:
        """Calls a hook of every observer, on the main process; none may return a value."""
        if not self.is_main:
            return
        for observer in self.observers:
            if getattr(observer, hook)(self, *args) is not None:
                raise LcpError(
                    f"observer {observer.name}: {hook} returned a value; it must be None."
                )

    def say(self, message: str) -> None:
        """One line for the user, once."""
        if self.is_main and message not in self.facts["said"]:
            self.facts["said"].append(message)
            log.warning(message)

    def wait(self) -> None:
        """All processes meet here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------ set-up


def start_run(config: RunConfig) -> Run:
    """Everything that can be known before a model is loaded, checked.

    Raises:
        LcpError: one line; nothing was changed on disk, but for --overwrite.
    """
    options = config.options
    store = RunStore(Path(options.output_dir or "output"), options.output_name or "last")
    strategy = create_strategy(options.strategy, options.strategy_args)
    base = identify_base(options.pretrained_model_name_or_path)
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
    tasks, configs = order_tasks(config, parent, strategy)
    if known is not None and known["status"] == "finished" and len(known["tasks"]) == len(tasks):
        raise ResumeError(
            f"run '{store.name}' is finished: {store.deliverable}. To learn more append [[tasks]] "
            f"to "
            "its config; to start over use --overwrite; else choose another --output_name."
        )
    check_images(configs[task.name] for task in tasks[len(store.folders()) :])
    facts = known or {"format": 1, "ended": [], "said": [], "base_sampled": False, "sessions": []}
    run = Run(config, store, strategy, base, parent, tasks, configs, seed, facts)
    facts.update(describe_run(run))
    return run


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
    same = (parent.strategy, parent.strategy_args) == (strategy.name, options.strategy_args)
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


def describe_run(run: Run) -> dict[str, Any]:
    """What run.json says of a run before it begins."""
    return {
        "name": run.name,
        "fingerprint": run.config.fingerprint(),
        "options": describe_options(run.options),
        "tasks": [record.to_json() for task in run.tasks for record in task.records()],
        "strategy": {"name": run.strategy.name, "args": list(run.options.strategy_args)},
        "base": asdict(run.base),
        "parent": {"source": run.parent.source, "hash": run.parent.hash},
        "seed": run.seed,
        "order_seed": run.options.order_seed,
        "versions": versions(),
        "session": secrets.token_hex(4),
        "text_delta": text_delta_hash(run.parent.carry),
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Options that differ from their defaults, JSON-able."""
    plain = Options()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(options).items()
        if value != getattr(plain, key)
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


# ---------------------------------------------------------------------------------- execution


def execute(config: RunConfig) -> Run:
    """Runs a configuration to its end.

    Raises:
        LcpError: one line. Interrupted: a signal came; the state is saved.
    """
    options = config.options
    accelerator = create_accelerator(options.mixed_precision, options.log_with, options.logging_dir)
    run = join_run(config, accelerator)
    with locked(run), stopping_on_signals(run.stop):
        load_model(run)
        run.observers = create_observers(run)
        try:
            run.tell("on_run_begin")
            carry = run.learn()
            if run.is_main:
                run.deliver(carry)
            run.write_facts(status="finished")
            run.tell("on_run_end")
        except BaseException as error:
            run.tell("on_exception", error)
            raise
    return run


def join_run(config: RunConfig, accelerator: Any) -> Run:
    """The run as rank 0 finds it on disk, on every process."""
    if accelerator.num_processes == 1:
        run = start_run(config)
    else:
        mine: list[Run] = []

        def decide() -> tuple[int, dict[str, Any]]:
            mine.append(start_run(config))
            return mine[0].seed, mine[0].facts

        seed, facts = share_decision(accelerator, decide)
        carry = share_carry(accelerator, lambda: mine[0].parent.carry)
        run = mine[0] if mine else follow_run(config, Parent(carry=carry), seed, facts)
    run.accelerator, run.device = accelerator, str(accelerator.device)
    return run


def follow_run(config: RunConfig, parent: Parent, seed: int, facts: dict[str, Any]) -> Run:
    """The run on another process than rank 0: nothing is read from or written to its folder."""
    options = config.options
    strategy = create_strategy(options.strategy, options.strategy_args)
    tasks, configs = order_tasks(config, parent, strategy)
    store = RunStore(Path(options.output_dir or "output"), options.output_name or "last")
    base = BaseId(**facts["base"])
    return Run(config, store, strategy, base, parent, tasks, configs, seed, facts)


def load_model(run: Run) -> None:
    """The base on the device, its parent's delta on it, and room on the disk for what will come."""
    options = run.options
    pipeline = load_pipeline(
        options.pretrained_model_name_or_path, weight_dtype(options), options.vae
    )
    run.trainer = Trainer(options, pipeline, run.accelerator, run.seed, run.stop.is_set)
    run.trainer.adapted.check_fits(run.parent.carry.total)
    if run.is_main:
        require_free_space(run.store.output_dir, estimate_disk(run), f"run '{run.name}'")
        if run.parent.source is not None:
            run.store.save_parent(run.parent)
        run.write_facts(status="running")
    run.wait()
    run.show(run.parent.carry)


def estimate_disk(run: Run) -> int:
    """Bytes that the run writes at most, estimated: adapters, a dense carry, its deliverable, a
    state.
    """
    assert run.trainer is not None
    adapter = dense = 0
    for name in run.trainer.targets:
        out, inputs = layer_shape(run.trainer.adapted.layers[name])
        adapter += 4 * run.options.rank * (out + inputs)
        dense += 4 * out * inputs
    carry = min(dense, adapter * len(run.tasks)) + run.parent.carry.total.nbytes()
    return adapter * (len(run.tasks) + 3) + 3 * carry


def create_observers(run: Run) -> list[Observer]:
    """Built-in observers, then the user's in the order given; main process only."""
    if not run.is_main:
        return []
    observers: list[Observer] = [Console(), JsonLines()]
    if run.options.log_with:
        run.accelerator.init_trackers(run.options.log_tracker_name or "continual_sdxl")
        observers.append(Trackers(run.accelerator))
    observers += [create(Observer, name) for name in run.options.observer]
    for key, state in run.facts.get("observers", {}).items():
        index = int(key.split(":")[0])
        if index < len(observers):
            observers[index].load_state_dict(state)
    return observers


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """One process group at a time in a run's folder; the lock dies with its process."""
    if not run.is_main:
        yield
        return
    run.store.root.mkdir(parents=True, exist_ok=True)
    with (run.store.root / ".lock").open("w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; two runs of one name are then the user's care
            pass
        except OSError as error:
            raise DiskError(
                f"run '{run.name}' is being trained by another process; wait for it, or choose "
                "another --output_name."
            ) from error
        yield


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to save its state and stop; a second SIGINT stops at once."""

    def request(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log.warning("stopping behind this step (once more to stop at once) ...")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(run: Run) -> str:
    """What the user wants to know at the end."""
    folders: list[TaskFolder] = run.store.folders()
    size = run.store.deliverable.stat().st_size / 1e6
    learned = ", ".join(record.name for record in folders[-1].records)
    grid = run.store.root / "samples" / "grid.png"
    lines = [
        f"learned      {learned}  ({run.strategy.name}, seed {run.seed})",
        f"deliverable  {run.store.deliverable}  ({size:.1f} MB, one LoRA with every task)",
        f"task folders {run.store.root}",
    ]
    if grid.is_file():
        lines.append(f"sample grid  {grid}")
    lines.append(f"chain on it  --prev {folders[-1].path}")
    shares = [f.lineage["training"]["fused"] for f in folders]
    if any(s["fused"] for s in shares):
        worst = max(s["rounding_share"] for s in shares)
        lines.append(f"rounding     at most {worst:.2e} of ||D|| lost by fusing the carried delta")
    return "\n".join(lines)
