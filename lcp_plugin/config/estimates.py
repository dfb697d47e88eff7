"""What SDXL costs on a GPU: the constants of all estimates, their sources, and what was measured.

Weights, factors and the carried delta are counted from SDXL's shapes. What cannot be counted, the
seconds of a step and the memory of its activations, stands in `ASSUMED` until somebody measures it:
`lcp doctor --measure` writes its rows to `measured_file()`, and rows of other cards may be put
into `MEASURED`. A machine's own rows come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcp_plugin.config.options import Options

if TYPE_CHECKING:
    from lcp_plugin.strategies.recall import Recall

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
NATIVE_PIXELS = 1024**2
RESERVE_GB = 0.8  # CUDA's own context and what its allocator keeps
CARRY_NOTHING = ("naive", "joint", "independent", "merge_at_end")  # train on the published base
CARRY_DENSE = ("magmax",)


@dataclass(frozen=True)
class Measured:
    """What one preset cost on one card: one image of 1024 x 1024 a step, unless it says otherwise.

    `seconds` of a step at a chain's first task, `growth` of them with each task carried, relative.
    `activations_gb`: the peak of allocated memory less what is counted from shapes.
    """

    card: str
    checkpointing: bool
    half: bool
    seconds: float
    activations_gb: float
    growth: float = 0.0
    fp8: bool = False
    live_vae: bool = False
    image_seconds: float = 0.0  # of a denoising step of one image with guidance; 0: not measured
    source: str = "measured"

    @property
    def told(self) -> str:
        """Card and source in words."""
        return f"{self.card} ({self.source})"


# By checkpointing. Activations with it are what a CPU run in bf16 left over beside weights and
# factors; without it, and seconds, they are what users of a 24 GB GPU report (sd-scripts#827).
ASSUMED: tuple[Measured, ...] = (
    Measured("a GPU like an RTX 3090", True, True, 1.65, 2.0, source="estimate"),
    Measured("a GPU like an RTX 3090", False, True, 1.1, 11.0, source="estimate"),
)
ASSUMED_IMAGE_SECONDS = 0.3  # estimate: 8 s for an image in 30 steps, as such a card's users report
# Rows of `lcp doctor --measure --json FILE` ("costs" in the file), the card named.
# NVIDIA H200 with a slow host (the step waits for it to launch kernels), 1024 px, rank 32.
_H200 = "measured 2026-11, torch 2.11"
MEASURED: tuple[Measured, ...] = (
    Measured("an NVIDIA H200", False, True, 0.466, 5.7, source=_H200),
    Measured("an NVIDIA H200", True, True, 0.670, 0.5, source=_H200),
    Measured("an NVIDIA H200 held to 8 GB", True, True, 1.091, 0.866, fp8=True, source=_H200),
)


def measured_file() -> Path:
    """Where this machine's own measurements are kept."""
    from lcp_plugin.formats.disk import cache_folder

    return cache_folder() / "measured.json"


def read_costs(file: Path) -> list[Measured]:
    """The rows of a file that doctor's --measure wrote; none where it is missing or damaged."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["costs"]
        known = {field.name for field in fields(Measured)}
        return [Measured(**{k: v for k, v in row.items() if k in known}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def find_cost(options: Options, own: Sequence[Measured] | None = None) -> Measured:
    """The measured row that is most like these options, a machine's `own` (None: those on disk)
    before others'; the assumption where nothing like them was measured.
    """
    own = read_costs(measured_file()) if own is None else own
    half = options.mixed_precision != "no"
    for rows in (own, MEASURED, ASSUMED):
        fitting = [r for r in rows if r.checkpointing == options.gradient_checkpointing]
        fitting = [r for r in fitting if r.half == half or rows is ASSUMED]
        if fitting:
            return max(fitting, key=lambda row: _likeness(row, options))
    raise AssertionError("ASSUMED has both kinds of checkpointing")


def _likeness(row: Measured, options: Options) -> int:
    fp8 = options.fp8_base or options.fp8_base_unet
    return (row.fp8 == fp8) + (row.live_vae == needs_vae(options))


def needs_vae(options: Options) -> bool:
    """Whether images are encoded in every step."""
    return not options.cache_latents or options.random_crop or options.color_aug


def needs_texts(options: Options) -> bool:
    """Whether captions are encoded in every step."""
    return not options.cache_text_encoder_outputs or options.trains_text_encoders


def shapes_of(options: Options) -> tuple[tuple[int, int, int], ...]:
    """(count, out, in) of the matrices that the options adapt."""
    return ATTENTION_SHAPES if options.lora_targets == "attention" else TRANSFORMER_SHAPES


def count_factors(shapes: Sequence[tuple[int, int, int]], rank: int) -> int:
    """Parameters of factors of this rank on all matrices."""
    return sum(count * rank * (out + inputs) for count, out, inputs in shapes)


def count_memory(options: Options, tasks: int) -> Mapping[str, float]:
    """GPU memory in GB by component that follows from shapes, at the last of `tasks` tasks."""
    half = options.mixed_precision != "no"
    width = 2 if half else 4
    stored = width if options.base_dtype == "auto" else 2
    unet = 1 if options.fp8_base or options.fp8_base_unet else stored
    factors = count_factors(shapes_of(options), options.rank)
    factor_width = 2 if options.full_bf16 or options.full_fp16 else 4
    eight_bit = "8bit" in options.optimizer_type.lower()
    return {
        "UNet": UNET_PARAMETERS * unet / GB,
        "text encoders": TEXT_PARAMETERS * stored / GB if needs_texts(options) else 0.0,
        "VAE": VAE_PARAMETERS * 4 / GB if needs_vae(options) else 0.0,  # always in fp32
        "LoRA and gradients": factors * 2 * factor_width / GB,
        "optimizer": factors * (2 if eight_bit else 8) / GB,
        "carried delta": _count_carried(options, tasks) / GB,
    }


def _count_carried(options: Options, tasks: int) -> float:
    """Bytes of the earlier tasks' updates on the device while the last task is trained.

    Fused, they take none: the untouched weights wait on the CPU. Beside weights that are stored in
    a smaller type, or as a branch that was asked for, they run as stacked factors while those are
    smaller than the dense matrix.
    """
    stored = options.fp8_base or options.fp8_base_unet
    stored = stored or options.base_dtype not in ("auto", options.mixed_precision)
    given = [arg.removeprefix("of=") for arg in options.strategy_args if arg.startswith("of=")]
    carries = (given or ["naive"])[0] if options.strategy == "recall" else options.strategy
    if tasks < 2 or carries in CARRY_NOTHING or not (stored or options.carry_as == "branch"):
        return 0.0
    width = 4.0 if options.mixed_precision == "no" else 2.0
    total = 0.0
    for count, out, inputs in shapes_of(options):
        dense, stacked = out * inputs, (tasks - 1) * options.rank * (out + inputs)
        smaller = stacked < dense and carries not in CARRY_DENSE  # as `delta` keeps it
        total += width * count * (stacked if smaller else dense)
    return total


def images_of(options: Options, pixels: int) -> float:
    """Images of 1024 x 1024 that are in memory at a time."""
    return options.train_batch_size * pixels / NATIVE_PIXELS


def estimate_memory(options: Options, tasks: int, pixels: int) -> dict[str, float]:
    """GPU memory in GB by component at the last of `tasks` tasks."""
    half = options.mixed_precision != "no"
    cost = find_cost(options)
    wider = 1.0 if half or not cost.half else 2.0
    return {
        **count_memory(options, tasks),
        "activations": cost.activations_gb * images_of(options, pixels) * wider,
        "CUDA itself": RESERVE_GB,
    }


def estimate_seconds(options: Options, pixels: int, tasks: int) -> float:
    """Seconds of an optimizer step, on the mean over a chain of `tasks` tasks."""
    cost = find_cost(options)
    images = images_of(options, pixels) * options.gradient_accumulation_steps
    slower = 3.0 if cost.half and options.mixed_precision == "no" else 1.0
    grown = 1.0 + cost.growth * (tasks - 1) / 2
    return cost.seconds * images * slower * grown


def image_seconds(options: Options, pixels: int, steps: int) -> float:
    """Seconds of an image drawn with guidance in `steps` denoising steps."""
    step = find_cost(options).image_seconds or ASSUMED_IMAGE_SECONDS
    return step * steps * pixels / NATIVE_PIXELS


def drawing_seconds(recall: Recall, options: Options, pixels: int, tasks: int) -> float:
    """Seconds that a chain of `tasks` tasks draws what it rehearses: each earlier task anew."""
    passes = 1.0 if recall.guidance == 1 else 2.0
    return (
        recall.count_images(tasks)
        * image_seconds(options, pixels, recall.sample_steps)
        * passes
        / 2
    )


def cost_facts(row: Any) -> dict[str, Any]:
    """A `Measured` as it is written to JSON."""
    return {field.name: getattr(row, field.name) for field in fields(Measured)}
