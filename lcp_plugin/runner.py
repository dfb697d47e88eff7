"""A run: learn a sequence of tasks, one boundary after another. Read `Run.learn` first.

Order of things on disk: the task folder (lineage.json last), then the deliverable, samples and
run.json, then
on_task_end is noted as done. A run killed anywhere picks up behind the last whole one of these.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import LcpError, LineageError
from lcp_plugin.files import cache_folder, require_free_space
from lcp_plugin.hooks import Carry, Observer
from lcp_plugin.observers import Console, JsonLines, Trackers
from lcp_plugin.parallel import (
    create_accelerator,
    share_carry,
    share_decision,
    share_object,
    share_start,
    share_tensors,
)
from lcp_plugin.planning import (
    Plan,
    describe_options,
    follow_plan,
    make_plan,
    stamp,
    versions,
)
from lcp_plugin.registry import create, create_strategy
from lcp_plugin.samples import BASE_STAGE, SamplePlan, draw_grid, sample_stage
from lcp_plugin.sdxl.conditioning import PromptBank
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.load import load_pipeline, native_resolution
from lcp_plugin.sdxl.sample import sample_images, starting_latents
from lcp_plugin.session import locked, stopping_on_signals
from lcp_plugin.store import Parent, TaskFolder, deliverable_header, hash_carry
from lcp_plugin.tasks import Task, TaskRecord
from lcp_plugin.trainer import Trained, Trainer, weight_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run(Plan):
    """Implements `hooks.RunView`: the plan with the live model, the observers and the processes."""

    device: str = "cpu"
    observers: list[Observer] = field(default_factory=list)
    accelerator: Any = None
    trainer: Trainer | None = None
    bank: PromptBank = field(default_factory=PromptBank)
    stop: threading.Event = field(default_factory=threading.Event)

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


# ---------------------------------------------------------------------------------- execution


def execute(config: RunConfig) -> Run:
    """Runs a configuration to its end.

    Raises:
        LcpError: one line. Interrupted: a signal came; the state is saved.
    """
    options = config.options
    accelerator = create_accelerator(options.mixed_precision, options.log_with, options.logging_dir)
    run = join_run(config, accelerator)
    lock = locked(run.store.root, run.name) if run.is_main else nullcontext()
    with lock, stopping_on_signals(run.stop):
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
        plan = make_plan(config)
    else:
        mine: list[Plan] = []

        def decide() -> tuple[int, dict[str, Any]]:
            mine.append(make_plan(config))
            return mine[0].seed, mine[0].facts

        seed, facts = share_decision(accelerator, decide)
        carry = share_carry(accelerator, lambda: mine[0].parent.carry)
        plan = mine[0] if mine else follow_plan(config, Parent(carry=carry), seed, facts)
    return Run(**vars(plan), accelerator=accelerator, device=str(accelerator.device))


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
