"""--dry_run: what a run would do, before any model is loaded. Estimates are `config.estimates`'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lcp_plugin.config.estimates import (
    GB,
    count_factors,
    drawing_seconds,
    estimate_memory,
    estimate_seconds,
    find_cost,
    shapes_of,
)
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.options import Options, option_fields
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.telling.wording import counted

TINY_COST = (  # seen at rank 16 with 3x3 convolutions
    f"Estimates are made for SDXL, not for {TINY_NAME}: there a step of 4 images takes about half",
    "a second on two CPU cores, twice that while it rehearses, and a run less than 1 GB of memory.",
)


class DataCounts(Protocol):
    """What the plan asks of a task's data (lcp_plugin.data.dataset.TaskData)."""

    num_batches_per_epoch: int
    notices: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Images to train on."""

    @property
    def num_reg_images(self) -> int:
        """Regularisation images."""

    @property
    def num_repeated_images(self) -> int:
        """Images of an epoch."""

    @property
    def bucket_counts(self) -> Mapping[tuple[int, int], int]:
        """Bucket -> images of an epoch."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions."""

    def total_steps(self, processes: int = 1) -> int:
        """Optimizer steps."""


@dataclass(frozen=True)
class Estimate:
    """What a run on SDXL costs; estimates, not measurements."""

    adapter_gb: float  # one task's adapter.safetensors, fp32
    disk_gb: float  # the whole output folder
    vram_gb: float  # at the last task
    hours: float
    card: str  # that the activations and the time belong to, and whether they were measured


def estimate_run(options: Options, steps: int, tasks: int, pixels: int) -> Estimate:
    """Costs on real SDXL, memory of the last task. `steps`: of all tasks; `pixels`: of an image."""
    shapes = shapes_of(options)
    adapter = 4 * count_factors(shapes, options.rank) / GB
    dense = 4 * sum(count * out * inputs for count, out, inputs in shapes) / GB
    carry = min(adapter * tasks, dense)
    states = 3 * adapter if options.resume_every_n_steps else 0.0
    return Estimate(
        adapter_gb=adapter,
        disk_gb=adapter * tasks + 2 * carry + states,
        vram_gb=sum(estimate_memory(options, tasks, pixels).values()),
        hours=estimate_seconds(options, pixels, tasks) * steps / 3600,
        card=find_cost(options).told,
    )


def describe_plan(
    config: RunConfig,
    tasks: Sequence[tuple[TaskConfig, DataCounts]],
    native: int | None,
    processes: int = 1,
) -> str:
    """The plan as text. `tasks` in the order in which they are learned; `native` of the base, in
    pixels, None where it is not known.
    """
    lines = ["Options (those not listed have their defaults)"]
    lines += _option_lines(config)
    lines += ["", f"Tasks in order, strategy {config.options.strategy}"]
    total = 0
    for number, (task, data) in enumerate(tasks, 1):
        steps = data.total_steps(processes)
        total += steps
        lines += _task_lines(number, task, data, steps)
    lines += ["", f"{counted(total, 'step')} in all on {counted(processes, 'process')}"]
    lines += ["", *_estimate_lines(config, tasks, total, native)]
    notices = [*config.notices, *(n for _, data in tasks for n in data.notices)]
    if notices:
        lines += ["", "Notices", *(f"  {notice}" for notice in dict.fromkeys(notices))]
    return "\n".join(lines)


def outline_plan(
    config: RunConfig,
    tasks: Sequence[tuple[TaskConfig, DataCounts]],
    native: int | None,
) -> list[str]:
    """The plan in short: a line for each task, all steps, and what a run on SDXL costs."""
    lines = [f"Tasks in order, strategy {config.options.strategy}"]
    width = max(len(task.name) for task, _ in tasks)
    for number, (task, data) in enumerate(tasks, 1):
        repeated = f"{data.num_repeated_images} with repeats"
        images = counted(data.num_images, "image")
        images += f", {repeated}" if data.num_repeated_images != data.num_images else ""
        lines.append(
            f"  {number:>2}. {task.name:<{width}}  {task.kind}  {task.concept!r}: "
            f"{counted(data.total_steps(), 'step')}, {images}"
        )
    total = sum(data.total_steps() for _, data in tasks)
    lines.append(f"{counted(total, 'step')} in all")
    lines += ["", *_estimate_lines(config, tasks, total, native)]
    notices = dict.fromkeys(n for _, data in tasks for n in data.notices)
    return [*lines, *(f"  {notice}" for notice in notices)]


def _estimate_lines(
    config: RunConfig,
    tasks: Sequence[tuple[TaskConfig, DataCounts]],
    total: int,
    native: int | None,
) -> list[str]:
    if config.options.pretrained_model_name_or_path == TINY_NAME:
        return [*TINY_COST]
    pixels = _largest(tasks, native)
    estimate = estimate_run(config.options, total, len(tasks), pixels)
    return [
        f"Estimates for SDXL at this size and all {counted(len(tasks), 'task')}, weights by shape,",
        f"activations and time of {estimate.card}",
        f"  one adapter     {estimate.adapter_gb:.2f} GB",
        f"  output folder   {estimate.disk_gb:.1f} GB",
        f"  GPU memory      {estimate.vram_gb:.1f} GB",
        f"  time            {_hours(estimate.hours)}",
        *_rehearsal_lines(config.options, estimate.hours, len(tasks), pixels),
    ]


def _rehearsal_lines(options: Options, hours: float, tasks: int, pixels: int) -> list[str]:
    """What rehearsing costs beside the steps' own time; none for strategies that do not."""
    added = rehearsal_seconds(options, hours * 3600, tasks, pixels)
    if not any(added):
        return []
    rehearsed, drawing = (seconds / 3600 for seconds in added)
    share = drawing / (hours + rehearsed) if hours else 0.0
    return [
        f"  rehearsing      {_hours(rehearsed)} more: a row takes about as long as a task's own",
        f"  drawing         {_hours(drawing)} for what is rehearsed, {share:.0%} of the training",
    ]


def rehearsal_seconds(
    options: Options, training: float, tasks: int, pixels: int
) -> tuple[float, float]:
    """What a strategy adds to tasks whose own steps take `training` seconds: seconds of rehearsing
    and of drawing for it. Tasks count as equally long.
    """
    from lcp_plugin.registry import create_strategy
    from lcp_plugin.strategies.recall import Recall

    strategy = create_strategy(options.strategy, options.strategy_args)
    known = 1 if options.prev else 0  # earlier tasks at the first one: of a chain at least one
    if not isinstance(strategy, Recall) or (tasks + known < 2 and not strategy.preserve):
        return 0.0, 0.0
    own = options.train_batch_size
    rows = [strategy.count_rows(own, at + known) / own for at in range(tasks)]
    rows[0] *= min(1.0, known + strategy.preserve)
    share = sum(rows) / tasks / strategy.every
    return training * share, drawing_seconds(strategy, options, pixels, tasks + known)


def _option_lines(config: RunConfig) -> list[str]:
    width = max((len(n) for n in config.provenance), default=0)
    lines = []
    for name in option_fields():
        if name in config.provenance:
            value = getattr(config.options, name)
            secret = name in ("wandb_api_key", "huggingface_token") and value
            shown = "(hidden)" if secret else _shown(value)
            lines.append(f"  {name:<{width}}  {shown:<24}  {config.provenance[name]}")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else "below 0.1 h"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(v) for v in value) or "(none)"
    return str(value)


def _task_lines(number: int, task: TaskConfig, data: DataCounts, steps: int) -> list[str]:
    buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in data.bucket_counts.items())
    captions = data.captions
    more = f"; ... ({len(captions)} different ones)" if len(captions) > 2 else ""
    shown = "; ".join(repr(c) for c in captions[:2]) + more
    reg = f" (and {data.num_reg_images} for regularisation)" if data.num_reg_images else ""
    lines = [
        f"  {number}. {task.name} ({task.kind} {task.concept!r}): {counted(steps, 'step')}",
        f"     images: {data.num_images}{reg}, {data.num_repeated_images} with repeats, "
        f"in {counted(data.num_batches_per_epoch, 'batch')} an epoch",
        f"     buckets: {buckets}",
        f"     captions: {shown}",
    ]
    if task.overrides:
        own = ", ".join(f"{key} = {_shown(value)}" for key, value in task.overrides.items())
        lines.append(f"     of its own: {own}")
    return lines


def _largest(tasks: Sequence[tuple[TaskConfig, DataCounts]], native: int | None) -> int:
    """Pixels of the largest bucket; SDXL's own where there are none."""
    sizes = [w * h for _, data in tasks for w, h in data.bucket_counts]
    return max(sizes, default=(native or 1024) ** 2)
