"""How long to train, and one-file checkpoints: safetensors with facts as JSON in the header."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tiny_base.muon import MuonAdamW

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Stage:
    """How a part is pretrained: how long, from which seed, and what is kept of it on the way."""

    checkpoint: Path  # goes on from it if it exists
    budget: Budget
    seed: int
    save_every: float = 300.0  # seconds
    report: Callable[[MuonAdamW, Mapping[str, Any]], None] | None = None  # after each checkpoint

    def go_on(self, optimiser: MuonAdamW, part: str, loss: float) -> float:
        """The optimiser as the checkpoint left it, if there is one; the loss so far."""
        if not self.checkpoint.exists():
            return loss
        tensors, facts = load_checkpoint(self.checkpoint)
        optimiser.load_state_dict(tensors, facts["steps"])
        self.budget.spent = facts["seconds"]
        logger.info("continuing the %s from step %d", part, optimiser.steps)
        return float(facts["loss"])

    def facts(self, optimiser: MuonAdamW, loss: float) -> dict[str, Any]:
        """Steps, seconds and loss."""
        return {"steps": optimiser.steps, "seconds": self.budget.seconds, "loss": loss}

    def save(self, optimiser: MuonAdamW, loss: float) -> None:
        """A checkpoint, then the report; the optimiser's `average` holds the weights to show."""
        facts = self.facts(optimiser, loss)
        save_checkpoint(self.checkpoint, optimiser.state_dict(), facts)
        if self.report is not None:
            self.report(optimiser, facts)


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
