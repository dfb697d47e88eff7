"""What a task does between its steps: files, states, samples and validation, as kohya's options
ask for. All numbers count within the task.

An intermediate file holds the model as it is being trained at that step: the task's frozen base and
the factors so far, as one LoRA. (What a strategy makes of them at the boundary is not yet known.)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.milestones import SavePoint, list_save_points, samples_at, validates_at
from lcp_plugin.config.prompts import SamplePrompt, read_prompts
from lcp_plugin.formats.pictures import save_picture
from lcp_plugin.sdxl.devices import own_randomness
from lcp_plugin.sdxl.prompt_samples import draw_prompt, sample_file_name
from lcp_plugin.seeds import derive_seed
from lcp_plugin.training.learner import Learner
from lcp_plugin.training.lesson import Lesson
from lcp_plugin.training.state import write_state
from lcp_plugin.training.validation import measure_loss

WriteFile = Callable[[Path, Adapter, int], None]  # path, factors, step
TellValidation = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class Milestones:
    """The milestones of one lesson; implements `loop.Reader`. Only the main process has work."""

    stem: Path  # of the task's files, without a suffix: <output_dir>/<name>
    write_file: WriteFile
    tell_validation: TellValidation
    observer_states: Callable[[], dict[str, Any]]
    points: Mapping[int, Sequence[SavePoint]]  # by step
    prompts: tuple[SamplePrompt, ...]
    steps_per_epoch: int

    def visit(self, learner: Learner) -> None:
        """What is due at the learner's step (0: before the first)."""
        options = learner.lesson.options
        points = self.points.get(learner.step, ())
        samples = samples_at(options, learner.step, self.steps_per_epoch)
        validates = self._validates(learner)
        if not (points or samples or validates) or not learner.is_main:
            return
        if validates:
            self._validate(learner)
        for point in points:
            if point.keeps_state:
                self._write_state(learner, point.suffix)
        with learner.showing():
            if samples:
                self._sample(learner)
            for point in points:
                path = self._path(point.suffix, ".safetensors")
                self.write_file(path, learner.model.adapted.trained(), learner.step)
        for point in points:
            self._rotate(point)

    def finish(self, learner: Learner) -> None:
        """Behind the last step: save_state_on_train_end."""
        options = learner.lesson.options
        if (options.save_state_on_train_end or options.save_state) and learner.is_main:
            self._write_state(learner, "")

    def _write_state(self, learner: Learner, suffix: str) -> None:
        write_state(self._path(suffix, "-state"), learner, self.observer_states())

    def _path(self, suffix: str, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{suffix}{ending}")

    def _rotate(self, point: SavePoint) -> None:
        if point.old_file is not None:
            self._path(point.old_file, ".safetensors").unlink(missing_ok=True)
        if point.old_state is not None:
            shutil.rmtree(self._path(point.old_state, "-state"), ignore_errors=True)

    # --------------------------------------------------------------------------- validation

    def _validates(self, learner: Learner) -> bool:
        if learner.lesson.held_out is None:
            return False
        split = replace(learner.lesson.options, validation_split=1.0)  # a data set may have its own
        return validates_at(split, learner.step, self.steps_per_epoch)

    def _validate(self, learner: Learner) -> None:
        seed = learner.lesson.options.validation_seed
        with learner.showing():
            loss = measure_loss(
                learner.predict_alone,
                _list_batches(learner),
                learner.noise,
                learner.loss,
                learner.room.base.schedule,
                learner.room.seed if seed is None else seed,
            )
        learner.note_validation(loss)
        self.tell_validation(learner.step, loss)

    # ------------------------------------------------------------------------------ samples

    def _sample(self, learner: Learner) -> None:
        """Every prompt of the file, as kohya names them: <output_dir>/sample/<name>_..."""
        base, options, step = learner.room.base, learner.lesson.options, learner.step
        folder, default = self.stem.parent / "sample", learner.room.seed
        epoch = step // self.steps_per_epoch if options.sample_every_n_epochs else None
        stamp = time.strftime("%Y%m%d%H%M%S")
        for number, prompt in enumerate(self.prompts):
            seed = default if prompt.seed is None else prompt.seed
            with own_randomness(base.device, derive_seed(seed, "sample")), torch.no_grad():
                image = draw_prompt(base, prompt, options.sample_sampler, default)
            name = sample_file_name(self.stem.name, number, prompt.seed, step, epoch, stamp)
            facts = {"prompt": prompt.prompt, "seed": str(seed), "step": str(step)}
            save_picture(folder / name, image, facts)


def plan_milestones(
    lesson: Lesson,
    processes: int,
    stem: Path,
    write_file: WriteFile,
    tell_validation: TellValidation,
    observer_states: Callable[[], dict[str, Any]] = dict,
) -> Milestones:
    """All that is due between the steps of a lesson. `processes`: how many train it together."""
    options, per_epoch = lesson.options, lesson.data.steps_per_epoch(processes)
    points: dict[int, list[SavePoint]] = {}
    for point in list_save_points(options, lesson.data.total_steps(processes), per_epoch):
        points.setdefault(point.step, []).append(point)
    prompts = read_prompts(options.sample_prompts) if options.sample_prompts else ()
    return Milestones(
        stem=stem,
        write_file=write_file,
        tell_validation=tell_validation,
        observer_states=observer_states,
        points=points,
        prompts=tuple(prompts),
        steps_per_epoch=per_epoch,
    )


def _list_batches(learner: Learner) -> Iterator[Mapping[str, Any]]:
    """The held-out images' batches, on the device."""
    data = learner.lesson.held_out
    assert data is not None
    numbers: Iterable[int] = range(data.num_batches_per_epoch)
    for k in islice(numbers, learner.lesson.options.max_validation_steps):
        with torch.no_grad():
            yield learner.complete(data.batch(k))
