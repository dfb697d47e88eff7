"""CPU seconds from the start of a process to the end of step 1, on the embedded base.

Each start is a process of its own with empty caches of ours; the baseline is `example_startup`.
`--help` and a mistyped option are compared with the whole start: nothing heavy comes before the
arguments and the configuration are checked.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import CPU, Child, Row, alternate_children, run_child
from benchmarks.steps import draw_image, write_config
from lcp_plugin.tiny import model_dir

SIDE = 48
START_BAR, ANSWER_BAR = 0.6, 0.1
HERE = Path(__file__).parent
LIBRARIES = """
import gc, json, os, time
gc.disable()
os.environ["TORCHDYNAMO_DISABLE"] = "1"
from diffusers import StableDiffusionXLPipeline
StableDiffusionXLPipeline
print(json.dumps({"cpu": time.process_time(), "ended": time.time()}))
"""  # what no run can do without, in the cheapest way
SCRIPT = HERE.parents[1] / "train_continual_sdxl.py"


def measure_startup(rank: int = 16, rounds: int = 3) -> list[Row]:
    """Rows: the whole start against the example's, `--help` and a config error against it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = draw_image(folder / "disc" / "0.png", SIDE)
        config = write_config(folder, SIDE, rank, 1)
        baseline = [str(HERE / "example_startup.py"), str(model_dir()), str(image), str(SIDE)]

        def start() -> Child:
            observer = "benchmarks.first_step:FirstStep"
            return _run(folder, [*_ours(), "--config", str(config), "--observer", observer])

        def start_baseline() -> Child:
            return _run(folder, [sys.executable, *baseline, str(rank)])

        start(), start_baseline()  # files come into the system's cache
        ours, theirs = alternate_children(start, start_baseline, rounds)
        alone = [_run(folder, [sys.executable, "-c", LIBRARIES]) for _ in range(rounds)]
        helped = [_run(folder, [*_ours(), "--help"]) for _ in range(rounds)]
        wrong = [*_ours(), "--config", str(config), "--learning_rte", "1"]
        refused = [_run(folder, wrong, check=False) for _ in range(rounds)]
    assert all(child.status == 2 for child in refused), "a mistyped option was not refused"
    whole = _median_cpu(ours)
    rows = [
        Row(
            "start-up to the end of step 1, tiny",
            whole,
            _median_cpu(theirs),
            CPU,
            peak_mb=statistics.median(c.peak_mb for c in ours),
            bar=START_BAR,
            note=describe_imports(ours[0]),
            wall_ratio=_median_wall(ours) / _median_wall(theirs),
        ),
        Row(
            "of that: torch, diffusers' SDXL and what it imports",
            _median_cpu(alone),
            _median_cpu(theirs),
            CPU,
            note="the least that a start on these libraries can cost",
        ),
    ]
    for name, children in (("--help", helped), ("a config error", refused)):
        cost = statistics.median(c.cpu for c in children)
        rows.append(Row(f"{name} / whole start-up", cost, whole, CPU, bar=ANSWER_BAR))
    return rows


def describe_imports(child: Child) -> str:
    """Which large packages the start brings in."""
    found = child.facts.get("imported", {})
    return "imported: " + ", ".join(name for name, is_in in found.items() if is_in)


def _ours() -> list[str]:
    return [sys.executable, str(SCRIPT)]


def _run(folder: Path, command: Sequence[str], check: bool = True) -> Child:
    """A fresh output folder and cache each time."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        env = {**os.environ, "LCP_CACHE": own, "HF_HUB_OFFLINE": "1"}
        extra = ["--output_dir", own] if str(SCRIPT) in command else []
        return run_child([*command, *extra], env, check)


def _median_cpu(children: Sequence[Child]) -> float:
    return statistics.median(float(child.facts["cpu"]) for child in children)


def _median_wall(children: Sequence[Child]) -> float:
    return statistics.median(float(child.facts["ended"]) - child.began for child in children)
