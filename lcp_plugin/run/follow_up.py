"""What follows a finished run: exports and scores, if asked for, and its report. All can be made
again by `lcp export`, `evaluate` and `report`: a failure here loses nothing and is one line.

run.json records under "closed" what was made of which carry, so that the same command makes what a
kill, or a package that was missing, has left out, and nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import parse_bytes
from lcp_plugin.config.options import Options
from lcp_plugin.errors import DiskError, LcpError
from lcp_plugin.formats.disk import first_line
from lcp_plugin.formats.precisions import SAVED_AS
from lcp_plugin.report import write_report
from lcp_plugin.run.context import Context
from lcp_plugin.run.samples import mark_grid
from lcp_plugin.sdxl.devices import count_processes
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.store.lock import locked
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.telling.wording import quote

log = logging.getLogger(__name__)

Made = tuple[list[str], list[Path]]  # lines for the summary, files that must be there


def sum_up_run(run: Context) -> str:
    """What the user wants to know at the end."""
    folders = run.store.folders()
    size = run.store.deliverable.stat().st_size / 1e6
    learned = ", ".join(record.name for record in folders[-1].records)
    grid = run.store.root / "samples" / "grid.png"
    lines = [
        f"learned      {learned}  ({run.strategy.name}, seed {run.seed})",
        f"deliverable  {run.store.deliverable}  ({size:.1f} MB, one LoRA with every task)",
        f"task folders {run.store.root}",
    ]
    limit = run.options.max_file_size
    if limit and size * 1e6 > parse_bytes(limit):
        lines.append(f"file size    above {limit}: --export lora:RANK truncates it, with its error")
    if grid.is_file():
        lines.append(f"sample grid  {grid}")
    shares = [f.lineage["training"]["fused"] for f in folders]
    if any(s["fused"] for s in shares):
        worst = max(s["missing_share"] for s in shares)
        lines.append(f"rounding     at most {worst:.2e} of ||D|| lost by fusing the carried delta")
    return "\n".join(lines)


def next_steps(folder: Path, options: Options) -> list[str]:
    """Three commands for what people do next: look at it, learn more on it, take it along."""
    last, file = RunStore(folder.parent, folder.name).folders()[-1].path, f"{folder}.safetensors"
    taken = Path(f"{folder}_diffusers.safetensors")
    run, prev, lora, other = (quote(str(path)) for path in (folder, last, file, taken))
    look = f"lcp watch {run}" if options.evaluate else f"lcp evaluate {run}"
    return [
        "",
        "what next",
        f"  look at it       {look}",
        f"  learn more       lcp init MORE_PHOTOS --prev {prev}",
        f"  take it along    lcp export {lora} --as diffusers -o {other}",
        f"                   (ComfyUI and A1111 read {lora} as it is)",
    ]


def close_run(folder: Path, options: Options, device: str) -> list[str]:
    """Makes what is missing of the run in `folder`; the lines that the summary gains."""
    store = RunStore(folder.parent, folder.name)
    facts = store.read_run() or {}
    carry, closed = facts.get("deliverable", {}).get("carry_hash"), dict(facts.get("closed", {}))
    lines = []
    makers: dict[str, Callable[[], Made]] = {}
    if options.export:
        makers["exports"] = lambda: export_run(folder, options)
    if options.evaluate:
        makers["scores"] = lambda: score_run(folder, options, device)
    makers["report"] = lambda: _report_run(folder)
    for what, make in makers.items():
        asked = [carry, *_asked(what, options, closed)]
        if _is_whole(closed.get(what), asked):
            continue
        made = _try(what, make)
        if made is not None:
            lines += made[0]
            closed[what] = {"of": asked, "files": [str(path) for path in made[1]]}
            _record(store, closed)
    return lines


def _asked(what: str, options: Options, closed: dict[str, Any]) -> list[Any]:
    """What decides a part besides the carry; a report shows scores, so they are part of it."""
    if what == "exports":
        return [*options.export, options.save_precision]
    if what == "scores":
        settings = (options.evaluate_images, options.evaluate_prompts, options.sample_steps)
        return [*options.evaluate, *settings, options.guidance_scale]
    return [closed.get("scores")]


def _is_whole(known: dict[str, Any] | None, asked: list[Any]) -> bool:
    return (
        known is not None
        and known["of"] == asked
        and all(Path(file).exists() for file in known["files"])
    )


def _record(store: RunStore, closed: dict[str, Any]) -> None:
    """Notes in run.json what was made, unless another process goes on with the run by now."""
    try:
        with locked(store.root, store.name):
            store.write_run({**(store.read_run() or {}), "closed": closed})
    except DiskError as error:
        log.warning("run.json does not note what was made: %s", error)


def _report_run(folder: Path) -> Made:
    path = write_report(folder)
    return [f"report       {path}"], [path]


def export_run(folder: Path, options: Options) -> Made:
    """The forms that --export names, beside the deliverable."""
    from lcp_plugin.delivery.export import export_all
    from lcp_plugin.delivery.learned import read_learned
    from lcp_plugin.sdxl.load import find_base

    learned = read_learned(folder)
    base = find_base(options.pretrained_model_name_or_path)
    deliverable = folder.with_name(f"{folder.name}.safetensors")
    dtype = SAVED_AS[options.save_precision or "float"]
    made = export_all(learned, options.export, deliverable, base, dtype)
    return [f"exported     {one.path}" for one in made], [one.path for one in made]


def score_run(folder: Path, options: Options, device: str) -> Made:
    """The scores of every task after every task, as `lcp evaluate` prints them; the sample grid
    is marked by them.
    """
    from lcp_plugin.evaluation.command import run_command

    arguments = [str(folder), "--metrics", *options.evaluate, "--device", device.split(":")[0]]
    arguments += ["--images", str(options.evaluate_images), "--steps", str(options.sample_steps)]
    arguments += ["--guidance", str(options.guidance_scale)]
    if options.evaluate_prompts is not None:
        arguments += ["--prompts", str(options.evaluate_prompts)]
    arguments += ["--parallel", str(_processes(options, device))]
    lines = run_command(arguments).split("\n")
    mark_grid(folder)
    return lines, [folder / "evaluation" / "scores.json"]


def _processes(options: Options, device: str) -> int:
    """On a CPU one a core for the embedded base; anything larger has all cores in one process."""
    small = options.pretrained_model_name_or_path == TINY_NAME and device == "cpu"
    return count_processes() if small else 1


def _try(what: str, make: Callable[[], Made]) -> Made | None:
    try:
        return make()
    except (LcpError, ImportError, OSError, ValueError) as error:
        log.warning("no %s: %s", what, first_line(error, 300))
        return None
