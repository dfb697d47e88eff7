"""Runs that kill themselves at an event, and runs that end in an error."""

from __future__ import annotations

import os
import signal
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lcp_plugin.cli import main

LAW_2: dict[str, Any] = {  # everything that could make a resumed run differ
    "optimizer_type": "AdamW8bit",
    "network_dim": 4,
    "network_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "max_data_loader_n_workers": 2,
    "cache_latents": False,
    "random_crop": True,
    "learning_rate": 0.03,  # enough for a rounding of the carry to show in a sample
    "max_train_steps": 5,
    "resume_every_n_steps": 2,
    "samples_per_task": 1,
    "sample_steps": 2,
}


def run_and_kill(config: Path, kill_at: int | None) -> tuple[int, int]:
    """Runs a config in a forked process that kills itself (SIGKILL) at its n-th event.

    An event is an optimizer step, the moment before a rename (every third time with the temporary
    file cut in half first, as a power cut leaves it), or the moment after it.

    Returns:
        the process's status (-9 if killed) and, if it was not, its number of events.
    """
    _import_before_forking()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _run_with_events(config, kill_at, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    counted = os.read(reading, 16)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, int(counted or 0)


def _import_before_forking() -> None:
    """What a run imports when it needs it, once for all that are forked."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401

    with suppress(ImportError):
        import bitsandbytes  # noqa: F401


def _run_with_events(config: Path, kill_at: int | None, writing: int) -> int:
    from lcp_plugin.observers import JsonLines

    events = 0
    replace, on_step_end = os.replace, JsonLines.on_step_end

    def happen(half: Path | None = None) -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            if half is not None and events % 3 == 0:
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_with_events(source: Any, target: Any, **more: Any) -> None:
        happen(Path(source))
        replace(source, target, **more)
        happen()

    def step_with_events(self: Any, run: Any, step: Any) -> None:
        on_step_end(self, run, step)
        happen()

    os.replace, JsonLines.on_step_end = replace_with_events, step_with_events  # type: ignore[assignment, method-assign]
    status = main(["--config", str(config)])
    os.write(writing, str(events).encode())
    return status


def run_for_errors(
    capsys: pytest.CaptureFixture[str], config: Path, *flags: str
) -> tuple[int, str]:
    """Exit status and the error lines of a run."""
    capsys.readouterr()
    status = main(["--config", str(config), *flags])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return status, "\n".join(lines)
