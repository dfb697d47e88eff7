"""What a preset costs on the card at hand: SDXL built at its real size, trained, and sampled once.

    python -m lcp_plugin.doctor.measuring REQUEST.json ROWS.jsonl

The base has random weights, drawn on the device: nothing is downloaded. All else is a run's own
way (run/runner, run/lessons, training/loop): its plan, strategy, data, loop and samples. A process
of its own for each preset, so that none inherits another's memory; a row is written as soon as a
task is measured. The n-th task starts from what the strategy makes of n - 1 random adapters.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.config.estimates import (
    GB,
    Measured,
    cost_facts,
    count_memory,
    estimate_memory,
    estimate_seconds,
    images_of,
    needs_vae,
)
from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.config.options import Options
from lcp_plugin.errors import LcpError
from lcp_plugin.hooks import Carry, Observer, RunView, StepReport
from lcp_plugin.run.lessons import end_lesson, prepare_data, start_task, watch_lesson
from lcp_plugin.run.opening import start_processes
from lcp_plugin.run.plan import join_plan
from lcp_plugin.run.record import Logbook
from lcp_plugin.run.runner import Run, make_run
from lcp_plugin.run.settling import settle
from lcp_plugin.sdxl.live_base import build_live_base
from lcp_plugin.sdxl.load import hush_libraries
from lcp_plugin.sdxl.precision import Precision, peak_memory_mb
from lcp_plugin.tasks import Task
from lcp_plugin.tiny.architecture import SDXL, TINY, TOPO, draw_pipeline
from lcp_plugin.training.lesson import Lesson
from lcp_plugin.training.loop import train_lesson

SIZES = {"tiny": TINY, "topo": TOPO, "sdxl": SDXL}
WARM = 3  # steps that are not timed
PROMPT = "a photo of sks disc"
FITS, TOO_LARGE, FAILED, UNTRIED = "fits", "does not fit", "failed", "not tried"
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # how cuBLAS says that its workspace has no room


@dataclass(frozen=True)
class Request:
    """What one process measures."""

    preset: str
    size: str  # of SIZES
    side: int  # pixels
    rank: int | None  # None: the preset's own, else 32
    steps: int  # timed ones
    sample_steps: int
    tasks: int  # 1: the first task only; n: the n-th as well
    limit: int | None = None  # bytes that PyTorch may hold
    flags: tuple[str, ...] = ()  # further options of the training command


class StepTimes(Observer):
    """Seconds between the ends of steps, the device's work included."""

    name = "step_times"

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps, self.losses = device, list[float](), list[float]()

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Waits for the device: this is a measurement."""
        wait_for(self.device)
        self.stamps.append(time.perf_counter())
        self.losses.append(step.loss)

    def median(self) -> float:
        """Of all steps behind the warm ones."""
        ends = self.stamps[WARM - 1 :]
        return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------- the measuring


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """A row for the first task, and one for the n-th if asked for; a failure is a row too."""
    limit_memory(request.limit)
    facts: dict[str, Any] = {"preset": request.preset, "task": 1}
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            run = prepare_run(request, Path(folder))
            facts |= describe_request(request, run)
            facts["build_seconds"] = time.perf_counter() - began
            first: float | None = None
            for task in (1, request.tasks)[: 1 if request.tasks == 1 else 2]:
                facts |= {"task": task, **estimates_of(request, run, task)}
                row = {**facts, "status": FITS, **measure_task(run, task)}
                first = first or row["seconds"]
                yield row | {"cost": cost_of(run, row, first)}
                forget()
    except Exception as error:  # whatever it is, the other presets are still measured
        yield {**facts, **tell_failure(error)}


def tell_failure(error: Exception) -> dict[str, Any]:
    """Status and reason of what went wrong; no memory is a result."""
    lines = str(error).strip().split("\n")
    full = isinstance(error, torch.OutOfMemoryError) or NO_WORKSPACE in lines[0]
    told = lines[0] if isinstance(error, LcpError) else f"{type(error).__name__}: {lines[0]}"
    facts: dict[str, Any] = {"status": TOO_LARGE if full else FAILED, "reason": told}
    if torch.cuda.is_available():
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / GB
        facts["reserved_gb"] = torch.cuda.max_memory_reserved() / GB
    return facts


def limit_memory(limit: int | None) -> None:
    """Keeps PyTorch within `limit` bytes of the first GPU.

    Raises:
        LcpError: there is no GPU, or it has less.
    """
    if limit is None:
        return
    if not torch.cuda.is_available():
        raise LcpError("--limit holds for a GPU; torch can use none here.")
    total = torch.cuda.get_device_properties(0).total_memory
    if limit > total:
        raise LcpError(f"--limit {limit / GB:.1f}GB: the card has {total / GB:.1f} GB.")
    torch.cuda.set_per_process_memory_fraction(limit / total, 0)


def prepare_run(request: Request, folder: Path) -> Run:
    """A run as `runner.execute` plans it, on a base drawn on the device."""
    hush_libraries()
    config = settle(write_config(request, folder))
    accelerator = start_processes(config.options)
    plan, device = join_plan(config, accelerator), accelerator.device
    loaded = Precision.of(plan.options).loaded
    pipeline = draw_pipeline(SIZES[request.size], device, loaded)
    base = build_live_base(plan.options, pipeline, device, accelerator.autocast)
    logbook = Logbook(plan.store, plan.facts, writes=False)
    run = make_run(plan, base, accelerator, logbook)
    base.show(plan.parent.carry.change)
    wait_for(device)
    return run


def write_config(request: Request, folder: Path) -> RunConfig:
    """One task on one image; the preset's options, then the user's."""
    draw_image(folder / "disc" / "0.png", request.side)
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in {
            "pretrained_model_name_or_path": "tiny-sdxl",  # a name for its identity; never loaded
            "output_dir": (folder / "out").as_posix(),
            "cache_dir": (folder / "cache").as_posix(),
            "data_root": folder.as_posix(),
            "output_name": "measured",
            "resolution": request.side,
            "enable_bucket": False,
            "seed": 7,
            "max_train_steps": WARM + request.steps,
            "sample_steps": request.sample_steps,
            "samples_per_task": 0,
            "resume_every_n_steps": 0,
        }.items()
    ]
    lines += ["[[tasks]]", 'name = "disc"', 'concept = "sks disc"', 'image_dir = "disc"']
    path = folder / "measured.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    preset = ["--preset", request.preset, *rank_flags(request)]
    return load_config(["--config", str(path), *preset, *request.flags])


def rank_flags(request: Request) -> list[str]:
    """The rank asked for; none for a preset that has one of its own."""
    rank = request.rank or (None if request.preset == "paper" else 32)
    return [] if rank is None else ["--network_dim", str(rank), "--network_alpha", str(rank)]


def draw_image(path: Path, side: int) -> None:
    """A disc on `side` x `side` pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 6, side // 5, side // 1.5, side // 1.3), fill="teal")
    path.parent.mkdir(parents=True)
    image.save(path)


def measure_task(run: Run, number: int) -> dict[str, Any]:
    """Trains the chain's `number`-th task, crosses its boundary, and samples once."""
    base, device = run.base, run.base.device
    carry = play_tasks(run, number - 1)
    task = replace(run.tasks[0], index=number)
    options = task_options(run)
    times = StepTimes(device)
    run = replace(run, observers=(times,))
    reset_peak(device)
    data = prepare_data(run, task)
    row: dict[str, Any] = {f"encode_{key}": value for key, value in read_peak(device).items()}
    reset_peak(device)
    start = start_task(run, task, carry, options)
    lesson = Lesson(task, options, data, start, carry, began=time.time())
    trained = train_lesson(lesson, run.room, watch_lesson(run, lesson))
    row |= {"seconds": times.median(), "loss": times.losses[-1], **read_peak(device)}
    began = time.perf_counter()
    after = end_lesson(run, lesson, trained)
    base.show(after.change)
    wait_for(device)
    row["boundary_seconds"] = time.perf_counter() - began
    reset_peak(device)
    began = time.perf_counter()
    run.drawing.draw([PROMPT], seed=1)
    row["sample_seconds"] = time.perf_counter() - began
    row |= {f"sample_{key}": value for key, value in read_peak(device).items()}
    base.show(run.plan.parent.carry.change)
    return row


def task_options(run: Run) -> Options:
    """Those of the one task that is measured."""
    return run.plan.configs[run.tasks[0].name].options


def play_tasks(run: Run, count: int) -> Carry:
    """The carry behind `count` tasks whose adapters are random: as the strategy starts and ends
    each, without a step of training.
    """
    carry = Carry()
    options = task_options(run)
    for index in range(1, count + 1):
        task = replace(run.tasks[0], index=index, name=f"earlier{index}")
        start = start_task(run, task, carry, options)
        carry = run.strategy.end_task(task, carry, _learned(start.adapter, task))
    return carry


def _learned(adapter: Adapter, task: Task) -> Adapter:
    """The adapter with something small in B."""
    generator = torch.Generator().manual_seed(task.index)
    learned: dict[str, Factors] = {}
    for name, factors in adapter.items():
        noise = torch.randn(factors.up.shape, generator=generator) * 1e-3
        learned[name] = replace(factors, up=factors.up + noise)
    return Adapter(learned)


def forget() -> None:
    """What a task has left in memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------- memory and facts


def reset_peak(device: torch.device) -> None:
    """Peaks begin anew, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: torch.device) -> dict[str, float]:
    """Peaks in GB: of what PyTorch allocated and held on a GPU; of the whole process on a CPU."""
    wait_for(device)
    allocated = peak_memory_mb(device) * 2**20 / GB
    if device.type != "cuda":
        return {"peak_gb": allocated, "reserved_gb": allocated}
    return {"peak_gb": allocated, "reserved_gb": torch.cuda.max_memory_reserved(device) / GB}


def describe_request(request: Request, run: Run) -> dict[str, Any]:
    """What belongs to every row of the process."""
    options = task_options(run)
    return {
        **describe_card(),
        "size": request.size,
        "side": request.side,
        "limit_gb": request.limit / GB if request.limit else None,
        "flags": list(request.flags),
        "rank": options.rank,
        "strategy": options.strategy,
        "sample_steps": request.sample_steps,
        "parameters": sum(p.numel() for p in run.base.pipeline.unet.parameters()),
    }


def estimates_of(request: Request, run: Run, task: int) -> dict[str, float]:
    """What `config.estimates` says of SDXL's last task of so many; nothing at other sizes."""
    if request.size != "sdxl":
        return {}
    options, pixels = task_options(run), request.side**2
    return {
        "estimated_gb": sum(estimate_memory(options, task, pixels).values()),
        "estimated_seconds": estimate_seconds(options, pixels, task),
    }


def describe_card() -> dict[str, Any]:
    """The device that is measured, and what it holds besides PyTorch's memory."""
    if not torch.cuda.is_available():
        return {"card": "CPU", "torch": torch.__version__}
    free, total = torch.cuda.mem_get_info(0)
    return {
        "card": torch.cuda.get_device_name(0),
        "card_gb": total / GB,
        "outside_gb": (total - free - torch.cuda.memory_reserved(0)) / GB,
        "torch": torch.__version__,
    }


def cost_of(run: Run, row: dict[str, Any], first: float) -> dict[str, Any] | None:
    """The row of `config.estimates` that this one is; None but at SDXL's size on a GPU."""
    if row["size"] != "sdxl" or row["card"] == "CPU":
        return None
    options = task_options(run)
    counted = sum(count_memory(options, row["task"]).values())
    images = images_of(options, row["side"] ** 2)
    limit = f" held to {row['limit_gb']:g} GB" if row["limit_gb"] else ""
    carried = row["task"] - 1
    share = images * options.gradient_accumulation_steps
    return cost_facts(
        Measured(
            card=row["card"] + limit,
            checkpointing=options.gradient_checkpointing,
            half=Precision.of(options).computed is not torch.float32,
            seconds=round(first / share, 4),
            activations_gb=round(max(row["peak_gb"] - counted, 0.0) / images, 3),
            growth=round((row["seconds"] / first - 1) / carried, 4) if carried else 0.0,
            fp8=options.fp8_base or options.fp8_base_unet,
            live_vae=needs_vae(options),
            image_seconds=round(row["sample_seconds"] / row["sample_steps"], 4),
            source=f"measured, torch {row['torch']}",
        )
    )


def main(argv: Sequence[str]) -> int:
    """Writes a line of JSON for each row."""
    request_file, rows_file = map(Path, argv)
    facts = json.loads(request_file.read_text(encoding="utf-8"))
    request = Request(**{**facts, "flags": tuple(facts["flags"])})
    for row in measure(request):
        with rows_file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    return 0


def to_json(request: Request) -> str:
    """A request as the file that `main` reads."""
    return json.dumps(asdict(request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
