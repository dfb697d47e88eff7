"""A run in two CPU processes, as torchrun starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT = (str(ROOT / "train_continual_sdxl.py"),)
MODULE = ("-m", "lcp_plugin", "train")  # as who has installed it does


COMMON: dict[str, Any] = {
    "strategy": "merge_ortho_init",  # its state crosses the boundary too
    "network_dim": 4,
    "max_train_steps": 3,
    "resume_every_n_steps": 0,
}


def launch(
    config: Path, processes: int = 2, through: Sequence[str] = SCRIPT, **environment: str
) -> None:
    """torchrun on this machine's CPU; a failure shows the end of what was printed."""
    done = attempt(config, processes, through, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def attempt(
    config: Path, processes: int = 2, through: Sequence[str] = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command's end, whatever it is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", *through]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(
        [*command, "--config", str(config)], env=env, capture_output=True, text=True, timeout=600
    )
