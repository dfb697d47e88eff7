"""Scores without images: what the model predicts of fixed noise on the tasks' own pictures.

The noise bank of a task: 16 timesteps (evenly spaced over the schedule) x 2 noises x its images,
the same for every state of the model.

    L[i, j]      mean squared error of the prediction after task j on task i's bank
    normalised   (L_base - L) / (L_base - L_independent): 0 the base, 1 a model of that task alone
    self-drift   ||p_j - p_i||^2 / ||p_i - p_base||^2: how far the predictions on task i's bank have
                 moved since it was learned, in units of how far learning moved them
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError
from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.mirrors import encode_files
from lcp_plugin.evaluation.pictures import Stage, Studio
from lcp_plugin.evaluation.scores import none_if_nan, normalise_losses, rank_correlation
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.formats.identity import hash_file
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.noise import NoiseSchedule
from lcp_plugin.seeds import derive_seed

TIMESTEPS, NOISES, IMAGES = 16, 2, 5


@dataclass(frozen=True)
class NoiseBank:
    """One task's noisy latents and what the model should say of them."""

    noisy: Tensor  # (n, c, h, w), fp32
    target: Tensor  # (n, c, h, w): the noise, or v
    timesteps: Tensor  # (n,)
    prompt: str


@dataclass
class Prober:
    """Predictions of any state of the model on any task's bank, and what is read off them.

    Nothing is predicted twice: numbers are kept in `file` under the hashes of bank and weights, so
    that the base, a shared first task and the `independent` run count once for all runs, and once
    for all evaluations; predictions are kept in memory up to `room` bytes.
    """

    studio: Studio
    seed: int = 42
    file: Path | None = None
    room: int = 2**31  # bytes
    banks: dict[str, NoiseBank] = field(default_factory=dict)
    predicted: int = 0  # banks that the model was run on

    def __post_init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._numbers: dict[str, float | None] = {}
        if self.file is not None and self.file.is_file():
            self._numbers = _read_numbers(self.file)

    def loss(self, stage: Stage, task: EvalTask) -> float:
        """Mean squared error of a state of the model on the task's bank."""

        def measure() -> float:
            error = self.predict(stage, task).double() - self.bank(task).target.double()
            return float(error.square().mean())

        return self._remember(measure, task, stage)

    def drift(self, now: Stage, learned: Stage, base: Stage, task: EvalTask) -> float:
        """`self_drift` of three states of the model on the task's bank."""
        stages = (now, learned, base)
        return self._remember(
            lambda: self_drift(*(self.predict(stage, task) for stage in stages)), task, *stages
        )

    def predict(self, stage: Stage, task: EvalTask) -> Tensor:
        """The model's output on the task's bank   # (n, c, h, w), fp32 on the CPU."""
        key = (self.key(task), stage.weights)
        if key not in self._kept:
            self._kept[key] = self._run(stage, self.bank(task))
            self.predicted += 1
        self._kept.move_to_end(key)
        while len(self._kept) > 3 and sum(t.nbytes for t in self._kept.values()) > self.room:
            self._kept.popitem(last=False)
        return self._kept[key]

    def key(self, task: EvalTask) -> str:
        """What the numbers of a bank are kept under: all that decides it, besides the base, which
        the weights of a stage name.
        """
        studio = self.studio
        facts = [
            *(hash_file(file) for file in task.references[:IMAGES]),
            *(TIMESTEPS, NOISES, self.seed, task.name, _prompt_of(task)),
            *(str(studio.dtype), studio.vae, studio.base.v_prediction),
            studio.base.zero_terminal_snr,
            *(() if studio.base.texts.are_plain else asdict(studio.base.texts).values()),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def bank(self, task: EvalTask) -> NoiseBank:
        """The task's bank, made at the first call."""
        key = self.key(task)
        if key not in self.banks:
            live = self.studio.live
            clean = encode_files(live, task.references[:IMAGES])
            seed = derive_seed(self.seed, "bank", task.name)
            self.banks[key] = make_bank(schedule_of(live), clean, _prompt_of(task), seed)
        return self.banks[key]

    def save(self) -> None:
        """Writes the numbers, if a file was given."""
        if self.file is not None and self._numbers:
            write_json(self.file, self._numbers)

    def _remember(self, measure: Callable[[], float], task: EvalTask, *stages: Stage) -> float:
        key = "/".join([self.key(task), *(stage.weights for stage in stages)])
        if key not in self._numbers:
            self._numbers[key] = none_if_nan(measure())
        value = self._numbers[key]
        return math.nan if value is None else value

    @torch.no_grad()
    def _run(self, stage: Stage, bank: NoiseBank) -> Tensor:
        live = self.studio.stand_on(stage)
        fixed = live.condition([bank.prompt])
        rows_at_once = 2 * self.studio.batch_size  # as many as guidance makes of a batch of images
        parts = []
        for start in range(0, len(bank.noisy), rows_at_once):
            noisy = bank.noisy[start : start + rows_at_once].to(live.device)
            steps = bank.timesteps[start : start + rows_at_once].to(live.device)
            rows = {k: v.expand(len(noisy), *v.shape[1:]) for k, v in fixed.items()}
            parts.append(live.predict(noisy, steps, rows).cpu())
        return torch.cat(parts)


def _prompt_of(task: EvalTask) -> str:
    return task.train_prompt.replace("{class_name}", "a house") or task.concept


def _read_numbers(file: Path) -> dict[str, float | None]:
    """A damaged cache is only a cache: its numbers are measured again."""
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError, FileFormatError):
        return {}


def schedule_of(base: LiveBase) -> NoiseSchedule:
    """The noise that images are drawn under, as diffusers rounds it; on the CPU."""
    alphas = base.pipeline.scheduler.alphas_cumprod.float().cpu()
    return NoiseSchedule(alphas, base.schedule.prediction_type)


def make_bank(schedule: NoiseSchedule, clean: Tensor, prompt: str, seed: int) -> NoiseBank:
    """Every image with every timestep and noise."""
    total = len(schedule.alphas)
    steps = ((torch.arange(TIMESTEPS) + 0.5) * total / TIMESTEPS).long()  # midpoints
    generator = torch.Generator().manual_seed(seed)
    count = len(clean) * TIMESTEPS * NOISES
    noise = torch.randn((count, *clean.shape[1:]), generator=generator)
    timesteps = steps.repeat_interleave(NOISES).repeat(len(clean))
    images = clean.repeat_interleave(TIMESTEPS * NOISES, dim=0)
    noisy, target = schedule.corrupt(images, noise, timesteps)
    return NoiseBank(noisy, target, timesteps, prompt)


def measure_losses(prober: Prober, chain: Chain) -> dict[str, Any]:
    """L and self-drift over (task, state), NaN before a task is learned, and the base's L."""
    count, untouched = len(chain.tasks), base_stage(chain.base_hash)
    losses, drift = np.full((count, count), np.nan), np.full((count, count), np.nan)
    base = [prober.loss(untouched, task) for task in chain.tasks]
    for i, j in chain.cells():  # oldest state first: (i, i) comes before (i, j > i)
        now, task = chain.stages[j], chain.tasks[i]
        losses[i, j] = prober.loss(now, task)
        drift[i, j] = prober.drift(now, chain.stages[i], untouched, task)
    return {"losses": losses, "self_drift": drift, "base": np.array(base)}


def self_drift(now: Tensor, learned: Tensor, base: Tensor) -> float:
    """||now - learned||^2 / ||learned - base||^2; NaN where learning changed nothing."""
    moved = float((learned.double() - base.double()).square().sum())
    return (
        float((now.double() - learned.double()).square().sum()) / moved if moved else float("nan")
    )


def losses_alone(prober: Prober, chain: Chain) -> Mapping[str, float]:
    """Of an `independent` run: every task's loss under its own adapter alone."""
    pairs = zip(chain.tasks, chain.stages, strict=True)
    return {task.name: prober.loss(stage, task) for task, stage in pairs}


def describe_losses(
    prober: Prober,
    chain: Chain,
    entry: Mapping[str, Any],
    alone: Sequence[Chain],
    metric: Metric,
) -> dict[str, Any]:
    """Loss matrix (normalised where an `independent` run of the same tasks is there), self-drift,
    and their rank correlation with the image scores.
    """
    found = measure_losses(prober, chain)
    image_scores = np.array(entry["metrics"][metric.name]["matrix"], dtype=float)
    twin = next(
        (c for c in alone if {t.name for t in c.tasks} == {t.name for t in chain.tasks}), None
    )
    normalised = np.full_like(found["losses"], np.nan)
    if twin is not None:
        own = losses_alone(prober, twin)
        reference = [own[task.name] for task in chain.tasks]
        normalised = normalise_losses(found["losses"], found["base"], reference)
    gained = 1 - found["losses"] / found["base"][:, None]
    return {
        "losses": _as_rows(found["losses"]),
        "base": [float(v) for v in found["base"]],
        "normalised": _as_rows(normalised),
        "self_drift": _as_rows(found["self_drift"]),
        "rank_correlation": {
            "loss_gain": none_if_nan(rank_correlation(gained, image_scores)),
            "self_drift": none_if_nan(rank_correlation(-found["self_drift"], image_scores)),
        },
    }


def _as_rows(matrix: Any) -> list[list[float | None]]:
    return [[none_if_nan(v) for v in row] for row in np.asarray(matrix).tolist()]
