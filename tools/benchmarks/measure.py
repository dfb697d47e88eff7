"""Pairs of measurements: alternated in one run, medians, CPU and wall seconds, peak memory.

Absolute figures belong to a machine, ratios carry over. Where a baseline is too slow or too large
to run whole, a sample of it runs and is scaled by its share; such rows say "extrapolated".
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU, WALL, MB = "CPU s", "s", "MB"


@dataclass(frozen=True)
class Timing:
    """Seconds of this process (CPU, all threads) and on the clock."""

    cpu: float
    wall: float

    def __mul__(self, factor: float) -> Timing:
        """Scaled from a sample to the whole."""
        return Timing(self.cpu * factor, self.wall * factor)


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is ours / baseline; `bar` is the largest ratio aimed at."""

    name: str
    ours: float
    baseline: float
    unit: str
    peak_mb: float | None = None  # of the process that did our part
    bar: float | None = None
    note: str = ""
    wall_ratio: float | None = None

    @property
    def ratio(self) -> float:
        """ours / baseline: below 1 is better than the baseline."""
        return self.ours / self.baseline

    @property
    def verdict(self) -> str:
        """Whether the bar is met; empty without one."""
        if self.bar is None:
            return ""
        return "met" if self.ratio <= self.bar else "missed"

    def to_json(self) -> dict[str, Any]:
        """The row of the file that --json writes."""
        return {
            "name": self.name,
            "ours": self.ours,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "unit": self.unit,
            "peak_mb": self.peak_mb,
            "wall_ratio": self.wall_ratio,
            "bar": self.bar,
            "met": None if self.bar is None else self.ratio <= self.bar,
            "note": self.note,
        }


def row_of(name: str, ours: Timing, baseline: Timing, unit: str = CPU, **more: Any) -> Row:
    """A row from two timings: CPU seconds with the clock's ratio beside it, or the clock's."""
    if unit == WALL:
        return Row(name, ours.wall, baseline.wall, unit, **more)
    return Row(name, ours.cpu, baseline.cpu, unit, wall_ratio=ours.wall / baseline.wall, **more)


class Clock:
    """Time since it was started."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Now is zero."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> Timing:
        """Since zero."""
        return Timing(time.process_time() - self._cpu, time.perf_counter() - self._wall)


def time_once(work: Callable[[], object]) -> Timing:
    """One execution."""
    clock = Clock()
    work()
    return clock.read()


def median(timings: Sequence[Timing]) -> Timing:
    """Medians of both clocks, each for itself."""
    return Timing(
        statistics.median(t.cpu for t in timings), statistics.median(t.wall for t in timings)
    )


def alternate(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 3, warm: int = 1
) -> tuple[Timing, Timing]:
    """Medians of both, run in turn, the first of a pair changing from round to round."""
    for _ in range(warm):
        ours()
        baseline()
    found: tuple[list[Timing], list[Timing]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append(time_once((ours, baseline)[side]))
    return median(found[0]), median(found[1])


# ----------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Child:
    """What a process cost."""

    cpu: float  # itself and its threads, to its end
    wall: float
    facts: Mapping[str, Any]  # the last line that it printed, if that is JSON
    status: int
    began: float  # seconds since 1970

    @property
    def peak_mb(self) -> float:
        """What the process itself printed (`print_facts`)."""
        return float(self.facts["peak_mb"])


def run_child(
    command: Sequence[str], env: Mapping[str, str] | None = None, check: bool = True
) -> Child:
    """Runs a program to its end and reads its costs from the system.

    Raises:
        RuntimeError: it failed and `check` is set; with the end of what it printed.
    """
    began, stamp = time.perf_counter(), time.time()
    process = subprocess.Popen(
        list(command),
        env=_finding_us(env or os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        printed = process.stdout.read()
    _, status, usage = _wait(process)
    wall = time.perf_counter() - began
    if status and check:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{printed[-2000:]}")
    facts: dict[str, Any] = {}
    with suppress(ValueError, IndexError):
        facts = dict(json.loads(printed.strip().split("\n")[-1]))
    return Child(usage.ru_utime + usage.ru_stime, wall, facts, int(status), stamp)


def _finding_us(env: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a child imports `benchmarks` too."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(paths)}


def _wait(process: subprocess.Popen[str]) -> tuple[int, int, resource.struct_rusage]:
    pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return pid, process.returncode, usage


def run_part(part: str, *arguments: str) -> Child:
    """A part of the bench in a process of its own: `python -m benchmarks.parts PART ...`."""
    return run_child([sys.executable, "-m", "benchmarks.parts", part, *arguments])


def alternate_children(
    ours: Callable[[], Child], baseline: Callable[[], Child], rounds: int
) -> tuple[list[Child], list[Child]]:
    """Both in turn, the first of a pair changing from round to round."""
    found: tuple[list[Child], list[Child]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append((ours, baseline)[side]())
    return found


def read_status(key: str) -> float:
    """A line of this process's status in MB; 0 where the system has none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def print_facts(**facts: float) -> None:
    """The line of JSON that a part ends with: `facts` and the peak of its memory."""
    print(json.dumps({**facts, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """The largest resident set of this process so far, mapped pages included.

    Linux hands a parent's ru_maxrss on to its children; VmHWM starts anew with each program.
    """
    return read_status("VmHWM") or _in_mb(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _in_mb(maxrss: int) -> float:
    return maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------------------------------- table


def format_table(rows: Sequence[Row]) -> str:
    """All rows as aligned text."""
    head = ("what", "ours", "baseline", "unit", "ratio", "bar", "", "wall ratio", "peak MB", "note")
    body = [
        (
            row.name,
            _digits(row.ours),
            _digits(row.baseline),
            row.unit,
            _digits(row.ratio),
            "" if row.bar is None else f"<= {row.bar:g}",
            row.verdict,
            "" if row.wall_ratio is None else _digits(row.wall_ratio),
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    ]
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent where that reads well."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
