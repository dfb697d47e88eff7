"""A run: learn a sequence of tasks, one boundary after another. Read `Run.learn` first.

Order of things on disk: the task folder (lineage.json last), then the deliverable, samples and
run.json, then
on_task_end is noted as done. A run killed anywhere picks up behind the last whole one of these.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.convert import parse_bytes
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.logs import TrackerSettings, tracker_settings
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import LcpError, LineageError
from lcp_plugin.formats.disk import cache_folder, require_free_space
from lcp_plugin.formats.lora_file import TOLERANCE, portable_adapter, write_checked_lora
from lcp_plugin.formats.precisions import SAVED_AS
from lcp_plugin.hooks import Carry, Observer, TaskStart
from lcp_plugin.observers import Console, JsonLines, Trackers
from lcp_plugin.registry import create, create_strategy
from lcp_plugin.run.network_weights import common_shape, going_on, parent_of, start_from
from lcp_plugin.run.plan import (
    Plan,
    describe_options,
    follow_plan,
    make_plan,
    settle_init,
    stamp,
    text_delta_hash,
    versions,
)
from lcp_plugin.run.samples import BASE_STAGE, SamplePlan, draw_grid, sample_stage
from lcp_plugin.run.session import stopping_on_signals, thawing, without_collecting
from lcp_plugin.sdxl.conditioning import PromptBank
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.load import load_pipeline, native_resolution
from lcp_plugin.sdxl.long_prompts import describe_cut
from lcp_plugin.sdxl.precision import Precision
from lcp_plugin.sdxl.sample import sample_images, starting_latents
from lcp_plugin.sdxl.traits import settle_zero_terminal
from lcp_plugin.store.carries import deliverable_adapter, hash_carry
from lcp_plugin.store.data_facts import describe_data
from lcp_plugin.store.deliverable_header import make_header
from lcp_plugin.store.lock import locked
from lcp_plugin.store.task_folder import Parent, TaskFolder
from lcp_plugin.tasks import MOST_CAPTIONS, Task, TaskRecord
from lcp_plugin.training.milestones import Interim
from lcp_plugin.training.processes import (
    create_accelerator,
    share_carry,
    share_decision,
    share_object,
    share_start,
    share_tensors,
)
from lcp_plugin.training.trainer import Trained, Trainer

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


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
                self.finish_boundaries(carry)
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
        held_out = self.prepare_validation(task)
        start = share_start(self.accelerator, lambda: self.begin_task(task, carry, options))
        self.tell("on_task_begin", task)
        interim = self.plan_interim(task, options, data, held_out, start, carry, began)
        trained = self.train(task, options, data, start, carry, interim)
        after = share_carry(
            self.accelerator, lambda: self.end_task(task, carry, options, data, trained)
        )
        if self.is_main:
            facts = self.describe_task(options, data, held_out, trained, began)
            keep = self.options.keep_carries
            self.store.save_task(task, trained.adapter, after, self.strategy, facts, keep)
            self.store.clear_state()
        self.share_strategy()
        return after

    def begin_task(self, task: Task, carry: Carry, options: Options) -> TaskStart:
        """The strategy's start; for a run's first task with the factors of network_weights."""
        assert self.trainer is not None
        spec = self.trainer.spec(task, options)
        start = self.strategy.begin_task(task, carry, spec)
        file = self.trainer.file
        return start_from(start, file, spec) if file and task is self.tasks[0] else start

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
        options = config.options
        cut = describe_cut(
            trainer.pipeline.tokenizer,
            data.captions,
            options.max_token_length,
            options.weighted_captions,
        )
        for notice in (*data.notices, *([f"task {task.name}: {cut}"] if cut else [])):
            self.say(notice)
        self.encode(data)
        return config.options, data

    def prepare_validation(self, task: Task) -> TaskData | None:
        """The task's held-out images, encoded; None where no data set holds any out."""
        assert self.trainer is not None
        config, side = self.configs[task.name], native_resolution(self.trainer.pipeline)
        if not any(dataset.validation_split > 0 for dataset in config.datasets):
            return None
        data = TaskData(config, self.seed, task.index, (side, side), part="validation")
        if data.num_batches_per_epoch == 0:
            self.say(f"validation_split of task {task.name} leaves no image to hold out.")
            return None
        self.encode(data)
        return data

    def encode(self, data: TaskData) -> None:
        """What the options allow to encode once."""
        assert self.trainer is not None
        options = data.task.options
        vae_key = f"{self.base.hash}:{options.vae or 'own'}:mean"
        text_key = f"{self.base.hash}:{self.facts['text_delta']}"
        if options.max_token_length or options.weighted_captions:
            text_key += f":{options.max_token_length}:{options.weighted_captions}"
        # trained text encoders are never cached, so the parent's delta on them is all that counts
        data.prepare(self.trainer.encode_images, self.trainer.encode_prompts, vae_key, text_key)
        self.trainer.pipeline.vae.to("cpu")  # whoever needs it moves it back

    def plan_interim(
        self,
        task: Task,
        options: Options,
        data: TaskData,
        held_out: TaskData | None,
        start: TaskStart,
        carry: Carry,
        began: float,
    ) -> Interim:
        """Intermediate files, samples and validation of a task, under names of its own."""

        def write_file(path: Path, adapter: Adapter, step: int) -> None:
            after = Carry(start.base, adapter, carry.tasks).after(task, start.base, adapter)
            rank, alpha = common_shape(adapter)
            after = after.noting(images=data.num_images, steps=step, rank=rank, alpha=alpha)
            trained = Trained(adapter, {"steps": step})
            facts = self.describe_task(options, data, held_out, trained, began)
            records = [record.to_json() for record in after.tasks]
            folder = TaskFolder(
                self.store.root / task.folder, {"task": records[-1], "tasks": records, **facts}
            )
            self.write_lora(path, after, [*self.store.folders(), folder])

        alone = len(self.tasks) == 1 and task.index == 1
        name = self.store.name if alone else f"{self.store.name}-{task.folder}"
        return Interim(
            options=options,
            stem=self.store.output_dir / name,
            write_file=write_file,
            tell_validation=lambda step, loss: self.tell("on_validation", task, step, loss),
            validation=held_out,
        )

    def write_lora(self, path: Path, carry: Carry, folders: Sequence[TaskFolder]) -> None:
        """A carry as a LoRA file in the deliverable's form, read back before it counts."""
        assert self.trainer is not None
        adapter = portable_adapter(deliverable_adapter(carry))
        header = make_header(carry, adapter, folders, path.stem)
        dtype = SAVED_AS[self.options.save_precision or "float"]
        lost = write_checked_lora(path, adapter, header, dtype)
        if lost > TOLERANCE[dtype]:
            self.say(
                f"save_precision = {self.options.save_precision} cannot hold all of this LoRA: "
                f"up to {lost:.1%} of a module is rounded away; bf16 or float hold it."
            )

    def train(
        self,
        task: Task,
        options: Options,
        data: TaskData,
        start: TaskStart,
        carry: Carry,
        interim: Interim,
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
            interim=interim,
            learned=carry.tasks,
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
        rank, alpha = common_shape(trained.adapter)
        captions = data.captions[:MOST_CAPTIONS]
        if captions != (task.train_prompt,) and len(after.tasks) == len(carry.tasks) + 1:
            after = after.noting(captions=list(captions))
        return after.noting(
            images=data.num_images,
            data=data.fingerprint,
            steps=trained.facts["steps"],
            rank=rank,
            alpha=alpha,
        )

    # ---------------------------------------------------------------------------- boundaries

    def finish_boundaries(self, newest: Carry | None = None) -> None:
        """What follows a saved task: deliverable, samples, run.json, on_task_end; each once.

        `newest`: the carry behind the last task, if it need not be read from disk again. A dense
        carry takes gigabytes: the model leaves the older one before anything else is formed.
        """
        ended = set(self.facts["ended"])
        pending = [f for f in self.store.folders() if f.index not in ended]
        for folder in pending:
            last = folder is pending[-1]
            kept = newest if last else None
            carry = kept or self.store.carry_after(folder.index, create_strategy)
            self.show(carry)
            if last:
                self.deliver(carry)
            images = self.sample(folder.path.name, folder.records)
            task = next(t for t in self.tasks if t.index == folder.index)
            self.tell("on_sample", task, images)
            self.tell("on_task_end", task, carry)
            self.facts["ended"].append(folder.index)
            self.write_facts(status="running")

    def deliver(self, carry: Carry) -> None:
        """The deliverable, unless the one on disk records this very carry."""
        if self.store.delivered_hash() != hash_carry(carry):
            self.write_lora(self.store.deliverable, carry, self.store.folders())

    def show(self, carry: Carry) -> None:
        """Puts the live model on W0 + carry.total, without an adapter."""
        assert self.trainer is not None
        self.trainer.adapted.detach()
        self.trainer.adapted.set_base(carry.total, self.trainer.carry_as)
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
        self,
        options: Options,
        data: TaskData,
        held_out: TaskData | None,
        trained: Trained,
        began: float,
    ) -> dict[str, Any]:
        """The facts of lineage.json besides records and hashes; everything that varies is in
        "session".
        """
        assert self.trainer is not None
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
            "data": describe_data(data, held_out, int(self.accelerator.num_processes)),
            "training": trained.facts,
            "prediction_type": self.trainer.prediction_type,
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


@thawing()
def execute(config: RunConfig) -> Run:
    """Runs a configuration to its end.

    Raises:
        LcpError: one line. Interrupted: a signal came; the state is saved.
    """
    config = settle_zero_terminal(settle_init(config))
    options = config.options
    trackers = tracker_settings(options)
    folder = trackers.folder if trackers is not None else None
    with without_collecting():
        accelerator = create_accelerator(
            options.mixed_precision,
            usable_trackers(trackers) or None,
            None if folder is None else str(folder),
            some_unused=options.trains_text_encoders or bool(options.network_args),
            options=options,
        )
    run = join_run(config, accelerator)
    lock = locked(run.store.root, run.name) if run.is_main else nullcontext()
    with lock, stopping_on_signals(run.stop):
        for notice in config.notices:
            run.say(notice)
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
    with without_collecting():
        pipeline = load_pipeline(
            options.pretrained_model_name_or_path, Precision.of(options).loaded, options.vae
        )
    run.trainer = Trainer(options, pipeline, run.accelerator, run.seed, run.stop.is_set)
    start_chain(run)
    run.trainer.adapted.check_fits(run.parent.carry.total)
    if run.trainer.prediction_type == "v_prediction" and not options.v_parameterization:
        run.say("the base predicts v (its own files say so): v_parameterization is on.")
    if run.is_main:
        require_free_space(run.store.output_dir, estimate_disk(run), f"run '{run.name}'")
        if run.parent.source is not None:
            run.store.save_parent(run.parent)
        run.write_facts(status="running")
    run.wait()
    run.show(run.parent.carry)


def start_chain(run: Run) -> None:
    """Makes the file of network_weights the parent of a run that begins."""
    assert run.trainer is not None
    file = run.trainer.file
    if file is None or run.parent.source is not None:
        return
    first = run.tasks[0]
    spec = run.trainer.spec(first, run.configs[first.name].options)
    run.parent = parent_of(run.options, file, going_on(file, spec))
    run.facts["parent"] = {"source": run.parent.source, "hash": run.parent.hash}
    run.facts["text_delta"] = text_delta_hash(run.parent.carry)


def estimate_disk(run: Run) -> int:
    """Bytes that the run writes at most, estimated: adapters, a dense carry, its deliverable, a
    state.
    """
    assert run.trainer is not None
    adapter = dense = 0
    for name, target in run.trainer.select(run.configs[run.tasks[0].name].options).items():
        out, inputs = layer_shape(run.trainer.adapted.layers[name])
        adapter += 4 * target.rank * (out + inputs)
        dense += 4 * out * inputs
    carry = min(dense, adapter * len(run.tasks)) + run.parent.carry.total.nbytes()
    return adapter * (len(run.tasks) + 3) + 3 * carry


def create_observers(run: Run) -> list[Observer]:
    """Built-in observers, then the user's in the order given; main process only."""
    if not run.is_main:
        return []
    observers: list[Observer] = [Console(), JsonLines()]
    if start_trackers(run):
        observers.append(Trackers(run.accelerator))
    observers += [create(Observer, name) for name in run.options.observer]
    for key, state in run.facts.get("observers", {}).items():
        index = int(key.split(":")[0])
        if index < len(observers):
            observers[index].load_state_dict(state)
    return observers


def usable_trackers(settings: TrackerSettings | None) -> Any:
    """Those of the trackers asked for whose packages are installed, as accelerate takes them."""
    if settings is None:
        return []
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    return [name for name in settings.names if name in installed]


def start_trackers(run: Run) -> bool:
    """Starts what log_with asks for; whether anything is there to log to."""
    settings = tracker_settings(run.options)
    if settings is None:
        return False
    usable = usable_trackers(settings)
    if not usable:
        packages = " or ".join(settings.names)
        run.say(f"log_with = {run.options.log_with}: nothing is logged; pip install {packages}.")
        return False
    if settings.wandb_api_key and "wandb" in usable:
        importlib.import_module("wandb").login(key=settings.wandb_api_key)
    if settings.folder is not None:
        settings.folder.mkdir(parents=True, exist_ok=True)
    run.accelerator.init_trackers(
        settings.project, config=dict(settings.config) or None, init_kwargs=dict(settings.start)
    )
    return bool(run.accelerator.trackers)


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
    limit = run.options.max_file_size
    if limit and size * 1e6 > parse_bytes(limit):
        lines.append(f"file size    above {limit}: --export lora:RANK truncates it, with its error")
    if grid.is_file():
        lines.append(f"sample grid  {grid}")
    lines.append(f"chain on it  --prev {folders[-1].path}")
    shares = [f.lineage["training"]["fused"] for f in folders]
    if any(s["fused"] for s in shares):
        worst = max(s["missing_share"] for s in shares)
        lines.append(f"rounding     at most {worst:.2e} of ||D|| lost by fusing the carried delta")
    return "\n".join(lines)
