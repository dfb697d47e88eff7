"""What follows a finished run: exports and scores, if asked for, and its report. All can be made
again by tools/export.py, evaluate.py and report.py: a failure here loses nothing and is one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lcp_plugin.config.options import Options
from lcp_plugin.errors import LcpError
from lcp_plugin.hardware import SAVED_AS
from lcp_plugin.report import write_report

log = logging.getLogger(__name__)


def close_run(folder: Path, options: Options, device: str) -> list[str]:
    """Scores and report of the run in `folder`; the lines that the summary gains."""
    lines = []
    if options.export:
        lines += _try("exports", lambda: export_run(folder, options))
    if options.evaluate:
        lines += _try("scores", lambda: score_run(folder, options, device))
    lines += _try("report", lambda: [f"report       {write_report(folder)}"])
    return lines


def export_run(folder: Path, options: Options) -> list[str]:
    """The forms that --export names, beside the deliverable."""
    from lcp_plugin.export import export_all, read_learned
    from lcp_plugin.registry import create_strategy
    from lcp_plugin.sdxl.load import find_base

    learned = read_learned(folder, create_strategy)
    base = find_base(options.pretrained_model_name_or_path)
    deliverable = folder.with_name(f"{folder.name}.safetensors")
    dtype = SAVED_AS[options.save_precision or "float"]
    made = export_all(learned, options.export, deliverable, base, dtype)
    return [f"exported     {one.path}" for one in made]


def score_run(folder: Path, options: Options, device: str) -> list[str]:
    """The scores of every task after every task, as tools/evaluate.py prints them."""
    from lcp_plugin.evaluation.command import run_command

    arguments = [str(folder), "--metrics", *options.evaluate, "--device", device.split(":")[0]]
    arguments += ["--images", str(options.evaluate_images), "--steps", str(options.sample_steps)]
    arguments += ["--guidance", str(options.guidance_scale)]
    if options.evaluate_prompts is not None:
        arguments += ["--prompts", str(options.evaluate_prompts)]
    return run_command(arguments).split("\n")


def _try(what: str, make: Callable[[], list[str]]) -> list[str]:
    try:
        return make()
    except (LcpError, ImportError, OSError, ValueError) as error:
        log.warning("no %s: %s", what, str(error).split("\n")[0])
        return []
