"""Sample images of a run that was killed equal those of one that was not, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import run_and_kill
from PIL import Image
from toy_runs import STRATEGIES


def read_samples(out: Path) -> dict[str, bytes]:
    """Every sample and the grid, as pixels."""
    found = {}
    for path in sorted((out / "run" / "samples").rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(out).as_posix()] = image.tobytes()
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_after_a_kill_are_those_of_an_undisturbed_run(
    write_config: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    given = {"samples_per_task": 2, "sample_steps": 2, "network_dim": 4, "learning_rate": 0.03}
    config = write_config("run", tasks=(0, 1, 2), strategy=strategy, **given)
    out = tmp_path / "out"
    status, events = run_and_kill(config, None)
    assert status == 0
    whole = read_samples(out)
    assert len(whole) == 1 + 6 + 2 + 4 + 6  # the grid, the base, and what is known at each stage
    shutil.rmtree(out)
    share = 0.3 if STRATEGIES.index(strategy) % 2 else 0.6  # within stages of the samples too
    assert run_and_kill(config, int(share * events))[0] == -signal.SIGKILL
    assert run_and_kill(config, None)[0] == 0
    again = read_samples(out)
    assert again.keys() == whole.keys()
    assert [name for name in whole if again[name] != whole[name]] == []
