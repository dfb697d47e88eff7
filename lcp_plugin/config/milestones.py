"""When a task saves, samples and validates, and which older files it then removes.

Rules as in kohya-ss/sd-scripts (train_network.py, library/train_util.py at 48d368fa): epochs beat
steps for samples; the last epoch is not saved apart, since the final file holds it; file names are
`<name>-<epoch:06d>` and `<name>-step<step:08d>`. save_last_n_epochs = k keeps the files of the last
k saved epochs, save_last_n_steps = k those of the last k steps (steps, not files); states follow
the same unless their own option is set. save_n_epoch_ratio = r means every floor(epochs / r)
epochs. Where we differ: all numbers count within the task, and the last step is not saved apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcp_plugin.config.options import Options


@dataclass(frozen=True)
class SavePoint:
    """What is written after an optimizer step, and what goes. Suffixes follow the file's name."""

    step: int  # optimizer step within the task, from 1
    suffix: str  # "-000003" or "-step00000100"
    keeps_state: bool  # a state folder `<name><suffix>-state` too
    old_file: str | None = None  # suffix of the file to remove, if there is one
    old_state: str | None = None  # suffix of the state to remove, if there is one


def epoch_suffix(epoch: int) -> str:
    """Of the file after an epoch (from 1)."""
    return f"-{epoch:06d}"


def step_suffix(step: int) -> str:
    """Of the file after a step (from 1)."""
    return f"-step{step:08d}"


def list_save_points(
    options: Options, total_steps: int, steps_per_epoch: int
) -> tuple[SavePoint, ...]:
    """All intermediate files of a task in order; at one step an epoch's comes after a step's."""
    points = [_after_step(options, s) for s in range(1, total_steps) if _saves_step(options, s)]
    every = _epochs_between_saves(options, total_steps, steps_per_epoch)
    if every:
        whole = total_steps // steps_per_epoch
        last = whole if total_steps % steps_per_epoch else whole - 1  # the final file is the last
        points += [
            _after_epoch(options, epoch, every, epoch * steps_per_epoch)
            for epoch in range(every, last + 1, every)
            if epoch * steps_per_epoch < total_steps
        ]
    return tuple(sorted(points, key=lambda point: point.step))


def _saves_step(options: Options, step: int) -> bool:
    return bool(options.save_every_n_steps) and step % int(options.save_every_n_steps or 1) == 0


def _epochs_between_saves(options: Options, total_steps: int, steps_per_epoch: int) -> int:
    if options.save_n_epoch_ratio:
        epochs = math.ceil(total_steps / steps_per_epoch)
        return max(1, epochs // options.save_n_epoch_ratio)
    return options.save_every_n_epochs or 0


def _after_epoch(options: Options, epoch: int, every: int, step: int) -> SavePoint:
    def old(kept: int | None) -> str | None:
        gone = epoch - every * kept if kept else 0
        return epoch_suffix(gone) if gone > 0 else None

    kept = options.save_last_n_epochs
    return SavePoint(
        step,
        epoch_suffix(epoch),
        options.save_state,
        old(kept),
        old(options.save_last_n_epochs_state or kept) if options.save_state else None,
    )


def _after_step(options: Options, step: int) -> SavePoint:
    every = int(options.save_every_n_steps or 1)

    def old(kept: int | None) -> str | None:
        if not kept:
            return None
        gone = step - kept - 1
        gone -= gone % every
        return step_suffix(gone) if gone > 0 else None

    kept = options.save_last_n_steps
    return SavePoint(
        step,
        step_suffix(step),
        options.save_state,
        old(kept),
        old(options.save_last_n_steps_state or kept) if options.save_state else None,
    )


def samples_at(options: Options, step: int, steps_per_epoch: int) -> bool:
    """Whether sample_prompts are drawn after `step` optimizer steps of a task (0: before it)."""
    if not options.sample_prompts:
        return False
    if step == 0:
        return options.sample_at_first
    return _is_due(
        step, steps_per_epoch, options.sample_every_n_steps, options.sample_every_n_epochs
    )


def validates_at(options: Options, step: int, steps_per_epoch: int) -> bool:
    """Whether the held-out images are measured after `step` optimizer steps of a task.

    With a split but neither option, after every epoch.
    """
    if options.validation_split <= 0 or step == 0:
        return False
    steps, epochs = options.validate_every_n_steps, options.validate_every_n_epochs
    if not steps and not epochs:
        epochs = 1
    if steps and step % steps == 0:
        return True
    return _is_due(step, steps_per_epoch, None, epochs)


def _is_due(step: int, steps_per_epoch: int, steps: int | None, epochs: int | None) -> bool:
    if epochs:
        return step % steps_per_epoch == 0 and (step // steps_per_epoch) % epochs == 0
    return bool(steps) and step % int(steps or 1) == 0
