"""`lcp doctor --measure`: every preset that should fit, one process after another; a table.

The JSON file is written anew after each row, so that nothing measured is lost by what comes later.
At SDXL's size on a GPU the costs go to `config.estimates.measured_file()` too: from then on doctor
and --dry_run estimate with them, and name the card. This process keeps off the GPU itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.config.convert import Unfit, parse_bytes
from lcp_plugin.config.estimates import GB, RESERVE_GB, estimate_memory, measured_file
from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.doctor.machine import PRESETS
from lcp_plugin.doctor.measuring import (
    FAILED,
    FITS,
    SIZES,
    TOO_LARGE,
    UNTRIED,
    Request,
    rank_flags,
    to_json,
)
from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.disk import write_json
from lcp_plugin.telling.wording import counted

MEASURED_PRESETS = (*PRESETS, "paper")
MARGIN = 1.25  # a preset is tried up to here above its estimate: estimates are what is in question
ROOM = 0.1  # of the limit: held but unused memory that expandable segments could win back
SEGMENTS = "expandable_segments:True"
Tell = Callable[[str], None]


def measure_presets(
    request: Request, presets: Sequence[str], file: Path | None, tell: Tell
) -> list[dict[str, Any]]:
    """Measures each preset ("" in `request`); all rows, also in `file` as they come.

    Without `presets` all are tried whose estimates fit.
    """
    rows: list[dict[str, Any]] = []
    asked = [replace(request, preset=preset) for preset in presets or MEASURED_PRESETS]
    for one in asked:
        options_of(one)  # a mistyped option is told before anything is measured
    for one in asked:
        tell(f"measuring {one.preset} ...")
        found = [] if presets else leave_out(one)
        for row in found or run_request(one, tell):
            rows.append(row)
            tell(f"  {describe_row(row)}")
            if file is not None:
                write_json(file, {"format": 1, "rows": rows, "costs": list_costs(rows)})
    if not request.flags:
        keep_costs(list_costs(rows))
    return rows


def parse_limit(text: str | None) -> int | None:
    """Bytes of --limit. Raises ConfigError."""
    if text is None:
        return None
    try:
        limit = parse_bytes(text)
    except Unfit as error:
        raise ConfigError(f"--limit {text}: {error}.") from error
    if not torch.cuda.is_available():
        raise ConfigError("--limit is the memory of a GPU, and torch can use none here; leave out.")
    total = torch.cuda.get_device_properties(0).total_memory
    if limit > total:
        raise ConfigError(f"--limit {text}: the card has {total / GB:.1f} GB; wanted at most that.")
    return limit


def leave_out(request: Request) -> list[dict[str, Any]]:
    """A row that says why a preset is not tried; empty where it may fit."""
    if request.size != "sdxl" or not torch.cuda.is_available():
        return []
    need = sum(estimate_memory(options_of(request), request.tasks, request.side**2).values())
    total = torch.cuda.get_device_properties(0).total_memory
    room = min(request.limit or total, total) / GB
    if need <= room * MARGIN:
        return []
    reason = f"estimated at {need:.1f} GB of {room:.1f}; name it under --presets to try it"
    return [{"preset": request.preset, "task": 1, "status": UNTRIED, "reason": reason}]


def options_of(request: Request) -> Options:
    """The options of a run as the request asks for it. Raises ConfigError."""
    flags = ["--preset", request.preset, *rank_flags(request), "--list_strategies"]
    return load_config([*flags, *request.flags]).options


def run_request(request: Request, tell: Tell) -> list[dict[str, Any]]:
    """The rows of a process; once more with expandable segments where memory was held unused."""
    rows = _run_once(request, {})
    last = rows[-1]
    if last["status"] != TOO_LARGE or "ALLOC_CONF" in "".join(os.environ):
        return rows
    unused = last.get("reserved_gb", 0.0) - last.get("peak_gb", 0.0)
    if unused < ROOM * last.get("reserved_gb", 0.0):
        return rows
    tell(f"  memory is in pieces ({unused:.1f} GB held unused): again with {SEGMENTS}")
    return [row | {"allocator": SEGMENTS} for row in _run_once(request, {alloc_name(): SEGMENTS})]


def alloc_name() -> str:
    """The variable that torch's allocator reads."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return "PYTORCH_ALLOC_CONF" if version >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"


def _run_once(request: Request, more: Mapping[str, str]) -> list[dict[str, Any]]:
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": paths, **more}
    with tempfile.TemporaryDirectory() as folder:
        asked, written = Path(folder) / "request.json", Path(folder) / "rows.jsonl"
        asked.write_text(to_json(request), encoding="utf-8")
        command = [sys.executable, "-m", "lcp_plugin.doctor.measuring", str(asked), str(written)]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment
        )
        lines = written.read_text(encoding="utf-8").splitlines() if written.is_file() else []
    rows = [json.loads(line) for line in lines]
    if done.returncode or not rows:  # killed, or broken outside of what is caught
        told = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = f"the process ended with {done.returncode}: {told[:200]}"
        rows.append({"preset": request.preset, "task": 1, "status": FAILED, "reason": reason})
    return rows


# ---------------------------------------------------------------------------------------- costs


def list_costs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The costs of each preset: those of its last task, with the larger activations of both."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if cost := row.get("cost"):
            before = found.get(row["preset"], cost)["activations_gb"]
            found[row["preset"]] = {
                **cost,
                "activations_gb": max(before, cost["activations_gb"]),
                "preset": row["preset"],
            }
    return list(found.values())


def keep_costs(costs: Sequence[Mapping[str, Any]]) -> None:
    """This machine's own measurements for later estimates; of a preset the newest count."""
    if not costs:
        return
    file = measured_file()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["costs"]
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    new = {cost["preset"] for cost in costs}
    rows = known if isinstance(known, list) else []
    kept = [row for row in rows if isinstance(row, dict) and row.get("preset") not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"format": 1, "costs": [*costs, *kept]})


# ---------------------------------------------------------------------------------------- table

HEAD = (
    *("preset", "task", "s a step", "estimate", "GB", "held", "estimate"),
    *("boundary s", "image s", "image GB", "", "why"),
)


def format_rows(rows: Sequence[Mapping[str, Any]], request: Request) -> str:
    """The table with what it belongs to above it."""
    measured = next((row for row in rows if row.get("card")), {})
    card = measured.get("card", "no device")
    limit = f", PyTorch held to {request.limit / GB:g} GB" if request.limit else ""
    size = f"{SIZES[request.size].widths} wide" if request.size != "sdxl" else "SDXL's own size"
    lines = [
        f"{card}{limit}, torch {measured.get('torch', torch.__version__)}",
        f"{size}, {measured.get('parameters', 0):,} parameters in the UNet, random weights; "
        f"{request.side} px, image in {counted(request.sample_steps, 'step')}",
        "GB: peak of what was allocated; held: of what PyTorch's allocator held; image: both "
        "decoding and denoising",
    ]
    if "outside_gb" in measured:
        outside = measured["outside_gb"]
        lines.append(
            f"CUDA itself and other programs held {outside:.1f} GB beside that; estimates count "
            f"{RESERVE_GB} GB for them"
        )
    body = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in body) for i in range(len(HEAD))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in body
    ]
    return "\n".join([*lines, "", *table])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "-"

    return (
        row["preset"],
        str(row["task"]),
        number("seconds", 3),
        number("estimated_seconds", 2),
        number("peak_gb", 2),
        number("reserved_gb", 2),
        number("estimated_gb", 2),
        number("boundary_seconds", 1),
        number("sample_seconds", 1),
        number("sample_peak_gb", 2),
        row["status"],
        " ".join(filter(None, (row.get("reason", ""), row.get("allocator", "")))),
    )


def describe_row(row: Mapping[str, Any]) -> str:
    """A row in a line, as it comes."""
    if row["status"] != FITS:
        return f"task {row['task']}: {row['status']} ({row.get('reason', '')})"
    return (
        f"task {row['task']}: {row['seconds']:.3f} s a step, {row['peak_gb']:.2f} GB "
        f"({row['reserved_gb']:.2f} held), image {row['sample_seconds']:.1f} s"
    )
