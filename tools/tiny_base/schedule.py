"""How long to train, and one-file checkpoints: safetensors with facts as JSON in the header."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Budget:
    """Either a number of steps (the same weights every time) or minutes (as many steps as fit)."""

    steps: int | None = None
    minutes: float | None = None
    spent: float = 0.0  # seconds of earlier sessions
    started: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Start this session's clock now: drawing the data does not count."""
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds trained so far, all sessions together."""
        return self.spent + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """Share of the training that is behind us, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, self.seconds / (60 * self.minutes))


def learning_rate_share(progress: float, step: int, warmup: int, decay_from: float) -> float:
    """Rises over `warmup` steps, stays at 1, falls linearly to 0 from `decay_from` on."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))


def save_checkpoint(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write beside, then rename: a half-written file is never read."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, part, metadata={"facts": json.dumps(facts)})
    os.replace(part, file)


def load_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of `save_checkpoint`."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        facts: dict[str, Any] = json.loads(opened.metadata()["facts"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
