"""A task made ready for training, watched, and written down: what a run does around a lesson."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import LineageError, Page, explaining
from lcp_plugin.formats.disk import cache_folder
from lcp_plugin.hooks import Carry, StepReport, TaskStart
from lcp_plugin.run.boundary import write_carry_as_lora
from lcp_plugin.run.context import Context
from lcp_plugin.run.cut_texts import describe_cut_texts
from lcp_plugin.run.network_weights import common_shape, start_from
from lcp_plugin.run.record import describe_options, note_lesson, stamp, versions
from lcp_plugin.store.data_facts import describe_data
from lcp_plugin.store.task_folder import TaskFolder
from lcp_plugin.tasks import Task
from lcp_plugin.telling.wording import counted
from lcp_plugin.training.lesson import Lesson, Trained
from lcp_plugin.training.loop import Watch
from lcp_plugin.training.milestones import plan_milestones
from lcp_plugin.training.processes import share_start


def prepare_lesson(run: Context, task: Task, carry: Carry) -> Lesson:
    """The task's images read and encoded, and its start as the strategy makes it."""
    began, options = time.time(), run.plan.configs[task.name].options
    data, held_out = prepare_data(run, task), prepare_validation(run, task)
    start = share_start(run.accelerator, lambda: start_task(run, task, carry, options))
    return Lesson(task, options, data, start, carry, held_out, began)


def prepare_data(run: Context, task: Task) -> TaskData:
    """The task's images, read and encoded."""
    config, side = run.plan.configs[task.name], run.base.native_side
    options = config.options
    cache = Path(options.cache_dir) if options.cache_dir else cache_folder()
    data = TaskData(config, run.seed, task.index, (side, side), cache / "encoded")
    tokenizer = run.base.pipeline.tokenizer
    cut = describe_cut_texts(tokenizer, task.name, options, data.captions, task.prompts)
    for notice in (*data.notices, *cut):
        run.logbook.say(notice)
    _encode(run, data)
    return data


def prepare_validation(run: Context, task: Task) -> TaskData | None:
    """The task's held-out images, encoded; None where no data set holds any out."""
    config, side = run.plan.configs[task.name], run.base.native_side
    if not any(dataset.validation_split > 0 for dataset in config.datasets):
        return None
    data = TaskData(config, run.seed, task.index, (side, side), part="validation")
    if data.num_batches_per_epoch == 0:
        run.logbook.say(f"validation_split of task {task.name} leaves no image to hold out.")
        return None
    _encode(run, data)
    return data


def _encode(run: Context, data: TaskData) -> None:
    """What the options allow to encode once."""
    options, base = data.task.options, run.plan.base_id.hash
    vae_key = f"{base}:{options.vae or 'own'}:mean"
    text_key = f"{base}:{run.facts['text_delta']}"
    if options.max_token_length or options.weighted_captions:
        text_key += f":{options.max_token_length}:{options.weighted_captions}"
    # trained text encoders are never cached, so the parent's delta on them is all that counts
    data.prepare(run.base.encode_images, run.base.encode_prompts, vae_key, text_key)
    run.base.rest_vae()


def start_task(run: Context, task: Task, carry: Carry, options: Options) -> TaskStart:
    """The strategy's start; for a run's first task with the factors of network_weights."""
    spec = run.room.spec(task, options)
    start = run.strategy.begin_task(task, carry, spec)
    file = run.room.weights
    return start_from(start, file, spec) if file and task is run.tasks[0] else start


def watch_lesson(run: Context, lesson: Lesson) -> Watch:
    """The observers, and the task's own intermediate files, samples and validation."""
    task, store = lesson.task, run.store

    def tell_step(report: StepReport) -> None:
        run.tell("on_step_end", report)

    def write_file(path: Path, adapter: Adapter, step: int) -> None:
        carry, folder = _sketch_boundary(run, lesson, Trained(adapter, {"steps": step}))
        write_carry_as_lora(run, path, carry, [*store.folders(), folder])

    alone = len(run.tasks) == 1 and task.index == 1
    name = store.name if alone else f"{store.name}-{task.folder}"
    milestones = plan_milestones(
        lesson,
        int(run.accelerator.num_processes),
        store.output_dir / name,
        write_file,
        lambda step, loss: run.tell("on_validation", task, step, loss),
        run.observer_states,
    )
    return Watch(tell_step, (milestones,), run.observer_states)


def _sketch_boundary(run: Context, lesson: Lesson, trained: Trained) -> tuple[Carry, TaskFolder]:
    """Carry and folder as if the task ended here: its frozen base and the factors so far."""
    base, adapter = lesson.start.base, trained.adapter
    rank, alpha = common_shape(adapter)
    carry = lesson.carry.after(lesson.task, base, adapter)
    carry = carry.noting(
        images=lesson.data.num_images, steps=trained.facts["steps"], rank=rank, alpha=alpha
    )
    records = [record.to_json() for record in carry.tasks]
    facts = describe_lesson(run, lesson, trained)
    lineage = {"task": records[-1], "tasks": records, **facts}
    return carry, TaskFolder(run.store.root / lesson.task.folder, lineage)


def end_lesson(run: Context, lesson: Lesson, trained: Trained) -> Carry:
    """The strategy's carry, with what was learned on noted in its newest record."""
    task, before = lesson.task, lesson.carry
    after = run.strategy.end_task(task, before, trained.adapter)
    if len(after.tasks) != len(before.tasks) + len(task.records()):
        with explaining(Page.HOOKS):
            raise LineageError(
                f"strategy {run.strategy.name} returned a carry with "
                f"{counted(len(after.tasks), 'task record')} after task {task.index}; use "
                "carry.after(task, ...), which keeps them."
            )
    return note_lesson(replace(after, biases=before.biases), lesson, trained)


def save_lesson(run: Context, lesson: Lesson, trained: Trained, after: Carry) -> None:
    """The task folder, complete; the state of its training is gone then. Main process only."""
    if run.is_main:
        facts = describe_lesson(run, lesson, trained)
        keep = run.options.keep_carries
        run.store.save_task(lesson.task, trained.adapter, after, run.strategy, facts, keep)
        run.store.clear_state()


def describe_lesson(run: Context, lesson: Lesson, trained: Trained) -> dict[str, Any]:
    """The facts of lineage.json besides records and hashes.

    All that varies between two equal runs is in "session".
    """
    folders, plan = run.store.folders(), run.plan
    before = folders[-1].lineage["hashes"]["carry"] if folders else plan.parent.hash
    source = folders[-1].path.name if folders else plan.parent.source
    processes = int(run.accelerator.num_processes)
    return {
        "strategy": {"name": run.strategy.name, "args": list(run.options.strategy_args)},
        "base": asdict(plan.base_id),
        "parent": {"hash": before, "source": source},
        "seed": run.seed,
        "data": describe_data(lesson.data, lesson.held_out, processes),
        "training": trained.facts,
        "prediction_type": run.base.schedule.prediction_type,
        "options": describe_options(lesson.options),
        "versions": versions(),
        "session": {
            "id": run.facts["session"],
            "started_at": stamp(lesson.began),
            "finished_at": stamp(time.time()),
            "processes": processes,
            "device": run.device,
        },
    }
