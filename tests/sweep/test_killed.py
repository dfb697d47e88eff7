"""A sweep that is killed takes the run that it had started with it, and can be started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcp_plugin.evaluation.processes import library_server
from lcp_plugin.store.lock import is_held

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, of a machine that has much else to do


def wait_until(happened: Callable[[], bool]) -> None:
    """Fails where it does not happen in time."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.skipif(library_server() is None, reason="the run is a command of its own here")
def test_the_run_of_a_killed_sweep_saves_its_state_and_stops(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config("ignored", (0, 1), max_train_steps=3_000)
    output = tmp_path / "swept"
    words = ["sweep", "--config", str(config), "--strategies", "naive", "--orders", "0"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    sweep = subprocess.Popen(
        [sys.executable, "-m", "lcp_plugin", *words, "--seeds", "0", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = output / "runs" / "naive_order0_seed0"
    try:
        wait_until(lambda: (run / "logs" / "steps.jsonl").exists() and is_held(run) is True)
    finally:
        sweep.kill()
        sweep.wait()
    wait_until(lambda: is_held(run) is False)
    assert (run / "state").is_dir()  # where the same command goes on
    told = (output / "runs" / "naive_order0_seed0.log").read_text("utf-8")
    assert "stopping behind this step" in told
