"""--dry_run: what a run would do, before any model is loaded.

Estimates are labelled as such. Sizes come from SDXL's own shapes (a test computes them again from
the model's classes on the meta device). Activations at 1024 px with checkpointing are what a CPU
run in bf16 left over beside weights and factors (2.0 GB); without it, and seconds a step, they are
what users of a 24 GB GPU report (kohya-ss/sd-scripts#827: 1.1 s), so time is an order of magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.options import Options, option_fields
from lcp_plugin.config.task_table import TaskConfig

GB = 1e9
UNET_PARAMETERS = 2_567_463_684
VAE_PARAMETERS = 83_653_863
TEXT_PARAMETERS = 123_060_480 + 694_659_840  # CLIP-L, OpenCLIP bigG with its projection
# (count, out, in) of the adapted matrices
ATTENTION_SHAPES = ((60, 640, 640), (20, 640, 2048), (360, 1280, 1280), (120, 1280, 2048))
_OTHER_SHAPES = (
    (10, 5120, 640),  # ff.net.0.proj of the 640-wide blocks
    (10, 640, 2560),  # ff.net.2
    (60, 10240, 1280),
    (60, 1280, 5120),
    (10, 640, 640),  # proj_in and proj_out of the transformers
    (12, 1280, 1280),
)
TRANSFORMER_SHAPES = (*ATTENTION_SHAPES, *_OTHER_SHAPES)
_ACTIVATIONS = {True: 2.0, False: 11.0}  # GB at 1024 px, batch 1, half precision, by checkpointing
_SECONDS = {True: 1.65, False: 1.1}  # a step at 1024 px, batch 1, half precision, by checkpointing


class TaskFacts(Protocol):
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
    vram_gb: float
    hours: float


def count_factors(shapes: Sequence[tuple[int, int, int]], rank: int) -> int:
    """Parameters of factors of this rank on all matrices."""
    return sum(count * rank * (out + inputs) for count, out, inputs in shapes)


def estimate_run(options: Options, steps: int, tasks: int, pixels: int) -> Estimate:
    """Costs on real SDXL. `steps`: of all tasks together; `pixels`: of one image."""
    shapes = ATTENTION_SHAPES if options.lora_targets == "attention" else TRANSFORMER_SHAPES
    factors = count_factors(shapes, options.rank)
    adapter = 4 * factors / GB
    dense = 4 * sum(count * out * inputs for count, out, inputs in shapes) / GB
    carry = min(adapter * tasks, dense)
    states = 3 * adapter if options.resume_every_n_steps else 0.0
    return Estimate(
        adapter_gb=adapter,
        disk_gb=adapter * tasks + 2 * carry + states,
        vram_gb=_estimate_vram(options, factors, pixels, carry),
        hours=_estimate_seconds(options, pixels) * steps / 3600,
    )


def _estimate_vram(options: Options, factors: int, pixels: int, carry: float) -> float:
    half = options.mixed_precision != "no"
    width = 2 if half else 4
    stored = width if options.base_dtype == "auto" else 2
    unet = 1 if options.fp8_base or options.fp8_base_unet else stored
    weights = UNET_PARAMETERS * unet / GB
    if not options.cache_text_encoder_outputs or options.trains_text_encoders:
        weights += TEXT_PARAMETERS * stored / GB
    if not options.cache_latents or options.random_crop or options.color_aug:
        weights += VAE_PARAMETERS * 4 / GB  # always in fp32
    eight_bit = "8bit" in options.optimizer_type.lower()
    factor_width = 2 if options.full_bf16 or options.full_fp16 else 4
    trained = factors * (2 * factor_width + (2 if eight_bit else 8)) / GB
    images = options.train_batch_size * pixels / 1024**2
    activations = _ACTIVATIONS[options.gradient_checkpointing] * images * width / 2
    return weights + trained + activations + (carry / 2 if half else 0.0) + 0.8


def _estimate_seconds(options: Options, pixels: int) -> float:
    images = options.train_batch_size * options.gradient_accumulation_steps * pixels / 1024**2
    slower = 1.0 if options.mixed_precision != "no" else 3.0
    return _SECONDS[options.gradient_checkpointing] * images * slower


def describe_plan(
    config: RunConfig,
    tasks: Sequence[tuple[TaskConfig, TaskFacts]],
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
    lines += ["", f"{total} steps in all on {_count(processes, 'process', 'es')}"]
    pixels = _largest(tasks, native)
    estimate = estimate_run(config.options, total, len(tasks), pixels)
    lines += [
        "",
        "Estimates for SDXL at this size, computed from its shapes (not measured here)",
        f"  one adapter     {estimate.adapter_gb:.2f} GB",
        f"  output folder   {estimate.disk_gb:.1f} GB",
        f"  GPU memory      {estimate.vram_gb:.1f} GB",
        f"  time            {_hours(estimate.hours)} on a GPU like an RTX 3090",
    ]
    notices = [*config.notices, *(n for _, data in tasks for n in data.notices)]
    if notices:
        lines += ["", "Notices", *(f"  {notice}" for notice in dict.fromkeys(notices))]
    return "\n".join(lines)


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


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(v) for v in value) or "(none)"
    return str(value)


def _task_lines(number: int, task: TaskConfig, data: TaskFacts, steps: int) -> list[str]:
    buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in data.bucket_counts.items())
    captions = data.captions
    more = f"; ... ({len(captions)} different ones)" if len(captions) > 2 else ""
    shown = "; ".join(repr(c) for c in captions[:2]) + more
    reg = f" (and {data.num_reg_images} for regularisation)" if data.num_reg_images else ""
    lines = [
        f"  {number}. {task.name} ({task.kind} {task.concept!r}): {steps} steps",
        f"     images: {data.num_images}{reg}, {data.num_repeated_images} with repeats, "
        f"in {data.num_batches_per_epoch} batches an epoch",
        f"     buckets: {buckets}",
        f"     captions: {shown}",
    ]
    if task.overrides:
        own = ", ".join(f"{key} = {_shown(value)}" for key, value in task.overrides.items())
        lines.append(f"     of its own: {own}")
    return lines


def _largest(tasks: Sequence[tuple[TaskConfig, TaskFacts]], native: int | None) -> int:
    """Pixels of the largest bucket; SDXL's own where there are none."""
    sizes = [w * h for _, data in tasks for w, h in data.bucket_counts]
    return max(sizes, default=(native or 1024) ** 2)
