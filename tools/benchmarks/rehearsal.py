"""What rehearsal costs: the second task of a chain under recall beside the same task under naive.

Every side is a run of the training command in a process of its own, in turn; its steps.jsonl has
seconds and memory. Both continue one first task, so only rehearsal differs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.images import save_topo
from benchmarks.measure import MB, WALL, Row, run_child

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "configs" / "quickstart" / "objects"
SIDES: Mapping[str, int] = {"tiny": 48, "topo": 64}  # pixels
WARM = 3  # steps that are not counted
BARS = {1: 2.1, 2: 1.6}  # by `every`
MEMORY_BAR = 1.03


@dataclass(frozen=True)
class Cost:
    """What a task cost."""

    steps: Sequence[float]  # seconds of each, warm ones
    start: float  # seconds from the command to the end of its first step
    peak_mb: float


def measure_rehearsal(size: str, steps: int = 16, rounds: int = 2) -> list[Row]:
    """Rows: a step, the peak of memory and the drawing, against the same task without."""
    with tempfile.TemporaryDirectory() as name:
        bench = Chain(Path(name), size, steps)
        found: dict[int, list[Cost]] = {0: [], 1: [], 2: []}
        for number in range(rounds):
            for every in sorted(found, reverse=number % 2 == 1):
                found[every].append(bench.second_task(every, number))
    plain = found[0]
    rows = [_step_row(size, every, found[every], plain) for every in BARS]
    ours, theirs = (statistics.median(c.peak_mb for c in side) for side in (found[1], plain))
    rows.append(Row(f"peak memory of recall's step, {size}", ours, theirs, MB, bar=MEMORY_BAR))
    seconds = statistics.median(c.start for c in found[1])
    seconds -= statistics.median(c.start for c in plain)
    note = "8 images of one earlier concept in 12 steps; baseline: a training step"
    step = statistics.median(s for c in plain for s in c.steps)
    return [*rows, Row(f"what recall draws, {size}", max(seconds, 0.0), step, WALL, note=note)]


def _step_row(size: str, every: int, ours: Sequence[Cost], plain: Sequence[Cost]) -> Row:
    """Means: with every=2 steps that rehearse and steps that do not take turns."""
    mine, without = (statistics.mean(s for c in side for s in c.steps) for side in (ours, plain))
    label = f"recall's step, every={every}, {size}"
    return Row(label, mine, without, WALL, bar=BARS[every], note="baseline: naive, the same task")


class Chain:
    """A first task, and second ones on it."""

    def __init__(self, folder: Path, size: str, steps: int) -> None:
        self.folder, self.size, self.steps = folder, size, steps
        self.base = "tiny-sdxl" if size == "tiny" else str(save_topo(folder / "topo"))
        self._train("first", "robot", 1, "naive")

    def second_task(self, every: int, number: int) -> Cost:
        """Under naive (0), or rehearsed in every so many steps."""
        name = f"every{every}_{number}"
        given = ["recall", "--strategy_args", f"every={every}"] if every else ["naive"]
        chained = ["--prev", str(self.folder / "first"), "--allow_strategy_change"]
        began = self._train(name, "vase", self.steps + WARM, *given, *chained)
        return read_cost(self.folder / name / "logs" / "steps.jsonl", began)

    def _train(self, name: str, concept: str, steps: int, *strategy: str) -> float:
        """A run of one task by the training command; when it began, in seconds since 1970."""
        config = self.folder / f"{name}.toml"
        config.write_text(self._config(name, concept, steps), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train_continual_sdxl.py"), "--config", str(config)]
        return run_child([*command, "--strategy", *strategy]).began

    def _config(self, name: str, concept: str, steps: int) -> str:
        side = SIDES[self.size]
        options = {
            "pretrained_model_name_or_path": self.base,
            "output_dir": str(self.folder),
            "output_name": name,
            "resolution": side,
            "network_dim": 16,
            "network_alpha": 16,
            "max_train_steps": steps,
            "cache_latents": True,
            "cache_text_encoder_outputs": True,
            "samples_per_task": 0,
            "seed": 0,
        }
        task = {
            "name": concept,
            "kind": "object",
            "concept": f"sks {concept}",
            "image_dir": str(OBJECTS / concept),
        }
        return f"{_toml(options)}\n[[tasks]]\n{_toml(task)}"


def _toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def read_cost(log: Path, began: float) -> Cost:
    """Of a run of one task, from its steps.jsonl."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    seconds = [event["seconds"] for event in steps]
    return Cost(seconds[WARM:], steps[0]["time"] - began, steps[-1]["peak_memory_mb"])
