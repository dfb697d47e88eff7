"""Seconds of an optimizer step: the project's own trainer beside `example_style`, losses compared.

Ours is `train_lesson` as a run calls it: forward hooks, fused AdamW, cached latents and text.
Between two of its steps the baseline takes the same step: same factors, latents, noise, timestep.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.example_style import CaptionedImage, ExampleStyle
from benchmarks.measure import MB, Clock, Row, Timing, median, print_facts, row_of, run_part
from lcp_plugin.adapter import AdapterSpec
from lcp_plugin.config.load import load_config
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, StepReport, TaskStart
from lcp_plugin.sdxl.layers import choose_targets, find_layers, layer_shape
from lcp_plugin.sdxl.live_base import build_live_base
from lcp_plugin.sdxl.load import hush_libraries, load_pipeline, native_resolution
from lcp_plugin.seeds import derive_seed
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.tasks import Task
from lcp_plugin.tiny.architecture import build_topo
from lcp_plugin.training.lesson import Classroom, Lesson
from lcp_plugin.training.loop import Watch, train_lesson
from lcp_plugin.training.processes import create_accelerator

SEED, RATE, CAPTION = 7, 1e-4, "a photo of a sks disc"
LOSS_TOLERANCE = 1e-5  # relative
SIDES = {"tiny": (48,), "topo": (64, 128)}  # pixels
STEP_BAR = {"topo": 0.87}


@dataclass(frozen=True)
class Steps:
    """What the two sides did."""

    ours: Timing
    baseline: Timing
    losses: tuple[tuple[float, float], ...]  # ours and the baseline's, step by step

    @property
    def difference(self) -> float:
        """The largest relative difference of losses over all steps."""
        return max(abs(a - b) / abs(b) for a, b in self.losses)


def measure_steps(size: str, rank: int = 64, rounds: int = 7) -> list[Row]:
    """Rows for each image size: seconds of a step, the losses' difference, peak memory.

    Raises:
        AssertionError: the losses of the two sides differ by more than `LOSS_TOLERANCE`.
    """
    rows = []
    for side in SIDES[size]:
        name = f"step, {size}, {side} px, rank {rank}"
        for caches_text in (False, True):
            steps = compare_steps(size, side, rank, rounds, caches_text)
            assert steps.difference <= LOSS_TOLERANCE, f"{name}: losses differ, {steps.losses}"
            note = f"{len(steps.losses)} losses equal to {steps.difference:.1e}"
            label = f"{name} (baseline with cached text)" if caches_text else name
            bar = None if caches_text else STEP_BAR.get(size)
            rows.append(row_of(label, steps.ours, steps.baseline, bar=bar, note=note))
        rows.append(_compare_memory(size, side, rank))
    return rows


def _compare_memory(size: str, side: int, rank: int) -> Row:
    parts = ("step_ours", "step_baseline")
    ours, theirs = (run_part(part, size, str(side), str(rank)).facts["peak_mb"] for part in parts)
    name = f"peak memory of training, {size}, {side} px"
    return Row(name, ours, theirs, MB, peak_mb=ours, note="a process for each side, 3 steps")


def compare_steps(
    size: str, side: int, rank: int, rounds: int, caches_text: bool = False, warm: int = 2
) -> Steps:
    """Alternating steps of both sides from equal factors; the first `warm` ones are not timed."""
    with tempfile.TemporaryDirectory() as folder:
        ours = OurTraining(size, Path(folder), side, rank, rounds + warm)
        theirs = ours.baseline(caches_text)
        timings: tuple[list[Timing], list[Timing]] = ([], [])
        losses: list[tuple[float, float]] = []
        clock = Clock()

        def on_step(report: StepReport) -> None:
            timings[0].append(clock.read())
            clock.restart()
            loss = theirs.step(noise_generator(report.index - 1))
            timings[1].append(clock.read())
            losses.append((report.loss, loss))
            clock.restart()

        ours.train(on_step, clock.restart)
    return Steps(median(timings[0][warm:]), median(timings[1][warm:]), tuple(losses))


def noise_generator(step: int) -> torch.Generator:
    """The generator that the trainer makes for a micro-batch of task 1."""
    return torch.Generator().manual_seed(derive_seed(SEED, "noise", 1, step))


def train_ours(size: str, side: str, rank: str) -> None:
    """A part: three of our steps."""
    with tempfile.TemporaryDirectory() as folder:
        OurTraining(size, Path(folder), int(side), int(rank), 3).train(lambda report: None)
    print_facts()


def train_baseline(size: str, side: str, rank: str) -> None:
    """A part: three of the baseline's steps, without our trainer."""
    with tempfile.TemporaryDirectory() as folder:
        image = draw_image(Path(folder) / "0.png", int(side))
        pipeline = load_size(size)
        layers = find_layers({"unet": pipeline.unet})
        shapes = {n: layer_shape(layers[n]) for n in choose_targets(layers, "attention")}
        start = AdapterSpec(shapes, int(rank), float(rank), SEED).gaussian()
        factors = {name: (f.down, f.up) for name, f in start.items()}
        example = CaptionedImage(image, CAPTION, int(side))
        theirs = ExampleStyle(pipeline, factors, RATE, example)
        for step in range(3):
            theirs.step(noise_generator(step))
    print_facts()


class OurTraining:
    """The project's trainer on one cached image, as a run sets it up."""

    def __init__(self, size: str, folder: Path, side: int, rank: int, steps: int) -> None:
        self.image = draw_image(folder / "disc" / "0.png", side)
        path = write_config(folder, side, rank, steps)
        config = load_config(["--config", str(path)])
        self.options, self.folder, self.size = config.options, folder, size
        self.side, self.rank = side, rank
        self.pipeline = load_size(size)
        accelerator = create_accelerator("no")
        base = build_live_base(self.options, self.pipeline, accelerator.device)
        store = RunStore(folder / "out", "bench")
        self.room = Classroom(base, accelerator, MergeInit(), store, SEED)
        self.task = Task(1, "disc", "object", "sks disc", (), CAPTION)
        native = native_resolution(self.pipeline)
        self.data = TaskData(config.tasks[0], SEED, 1, (native, native))
        self.data.prepare(base.encode_images, base.encode_prompts, "vae", "text")
        adapter = self.room.spec(self.task, self.options).gaussian()
        self.start = TaskStart(base=Delta(), adapter=adapter)

    def train(
        self,
        on_step: Callable[[StepReport], None],
        before_training: Callable[[], None] = lambda: None,
    ) -> None:
        """All steps, `on_step` called after each."""
        before_training()
        lesson = Lesson(self.task, self.options, self.data, self.start, Carry())
        train_lesson(lesson, self.room, Watch(on_step))

    def baseline(self, caches_text: bool = False) -> ExampleStyle:
        """The example's way with the same start, on a model of its own."""
        pipeline = load_size(self.size)
        factors = {name: (f.down, f.up) for name, f in self.start.adapter.items()}
        image = CaptionedImage(self.image, CAPTION, self.side)
        return ExampleStyle(pipeline, factors, RATE, image, caches_text)


def load_size(size: str) -> Any:
    """The pipeline of `tiny` (the embedded base) or `topo`, in fp32, frozen."""
    hush_libraries()
    if size == "tiny":
        return load_pipeline("tiny-sdxl")
    pipeline: Any = build_topo()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    return pipeline


def draw_image(path: Path, side: int) -> Path:
    """A disc on `side` x `side` pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 6, side // 5, side // 1.5, side // 1.3), fill="teal")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_config(folder: Path, side: int, rank: int, steps: int) -> Path:
    """One task on `folder`/disc, with the defaults of the example where it has any."""
    path = folder / "bench.toml"
    path.write_text(
        f"""
pretrained_model_name_or_path = "tiny-sdxl"
output_dir = "{(folder / "out").as_posix()}"
output_name = "bench"
data_root = "{folder.as_posix()}"
resolution = {side}
enable_bucket = false
seed = {SEED}
network_dim = {rank}
network_alpha = {rank}
network_train_unet_only = true
cache_latents = true
cache_text_encoder_outputs = true
optimizer_type = "AdamW"
learning_rate = {RATE}
lr_scheduler = "constant"
max_train_steps = {steps}
max_grad_norm = 1.0
samples_per_task = 0
resume_every_n_steps = 0

[[tasks]]
name = "disc"
kind = "object"
concept = "sks disc"
image_dir = "disc"
train_prompt = "{CAPTION}"
""",
        encoding="utf-8",
    )
    return path
