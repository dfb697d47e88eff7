"""What a task does between its steps: files, states, samples and validation, as kohya's options
ask for. All numbers count within the task.

An intermediate file holds the model as it is being trained at that step: the task's frozen base and
the factors so far, as one LoRA. (What a strategy makes of them at the boundary is not yet known.)
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.milestones import SavePoint, list_save_points, samples_at, validates_at
from lcp_plugin.config.options import Options
from lcp_plugin.config.prompts import SamplePrompt, read_prompts
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.formats.pictures import save_picture
from lcp_plugin.sdxl.live import run_unet
from lcp_plugin.sdxl.load import native_resolution
from lcp_plugin.sdxl.noise import NoiseSchedule
from lcp_plugin.sdxl.precision import has_modes, set_mode
from lcp_plugin.sdxl.prompt_samples import draw_prompt, sample_file_name
from lcp_plugin.seeds import derive_seed
from lcp_plugin.training.state import write_state
from lcp_plugin.training.validation import measure_loss

if TYPE_CHECKING:
    from lcp_plugin.training.loop import TaskRun

log = logging.getLogger(__name__)

WriteFile = Callable[[Path, Adapter, int], None]  # path, factors, step
TellValidation = Callable[[int, float], None]  # step, loss


@dataclass
class Interim:
    """The milestones of one task."""

    options: Options
    stem: Path  # of the task's files, without a suffix: <output_dir>/<name>
    write_file: WriteFile
    tell_validation: TellValidation
    validation: TaskData | None = None  # the held-out images
    prompts: tuple[SamplePrompt, ...] = ()
    points: Mapping[int, Sequence[SavePoint]] = field(default_factory=dict)
    steps_per_epoch: int = 1

    def plan(self, total: int, steps_per_epoch: int) -> None:
        """Called once the number of steps is known."""
        points: dict[int, list[SavePoint]] = {}
        for point in list_save_points(self.options, total, steps_per_epoch):
            points.setdefault(point.step, []).append(point)
        self.points, self.steps_per_epoch = points, steps_per_epoch
        if self.options.sample_prompts:
            self.prompts = read_prompts(Path(self.options.sample_prompts))

    def visit(self, run: TaskRun) -> None:
        """What is due at the run's step (0: before the first)."""
        points = self.points.get(run.step, ())
        samples = samples_at(self.options, run.step, self.steps_per_epoch)
        validates = self._validates(run.step)
        if not (points or samples or validates) or not run.accelerator.is_main_process:
            return
        if validates:
            self._validate(run)
        for point in points:
            if point.keeps_state:
                write_state(self._path(point.suffix, "-state"), run)
        with showing(run):
            if samples:
                self._sample(run)
            for point in points:
                self.write_file(
                    self._path(point.suffix, ".safetensors"),
                    run.trainer.adapted.trained(),
                    run.step,
                )
        for point in points:
            self._rotate(point)

    def finish(self, run: TaskRun) -> None:
        """Behind the last step: save_state_on_train_end."""
        wanted = self.options.save_state_on_train_end or self.options.save_state
        if wanted and run.accelerator.is_main_process:
            write_state(self._path("", "-state"), run)

    def _path(self, suffix: str, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{suffix}{ending}")

    def _rotate(self, point: SavePoint) -> None:
        if point.old_file is not None:
            self._path(point.old_file, ".safetensors").unlink(missing_ok=True)
        if point.old_state is not None:
            shutil.rmtree(self._path(point.old_state, "-state"), ignore_errors=True)

    # --------------------------------------------------------------------------- validation

    def _validates(self, step: int) -> bool:
        if self.validation is None:
            return False
        split = replace(self.options, validation_split=1.0)  # a data set may have set its own
        return validates_at(split, step, self.steps_per_epoch)

    def _validate(self, run: TaskRun) -> None:
        seed = self.options.validation_seed
        with showing(run):
            loss = measure_loss(
                lambda noisy, steps, batch: _predict(run, noisy, steps, batch),
                self._batches(run),
                run.noise,
                run.loss,
                NoiseSchedule(run.trainer.alphas, run.trainer.prediction_type),
                run.trainer.seed if seed is None else seed,
            )
        run.validation.append([run.step, loss])
        self.tell_validation(run.step, loss)

    def _batches(self, run: TaskRun) -> Iterator[Mapping[str, Any]]:
        data = self.validation
        assert data is not None
        numbers: Iterable[int] = range(data.num_batches_per_epoch)
        for k in islice(numbers, self.options.max_validation_steps):
            with torch.no_grad():
                yield run.on_device(data.batch(k))

    # ------------------------------------------------------------------------------ samples

    def _sample(self, run: TaskRun) -> None:
        """Every prompt of the file, as kohya names them: <output_dir>/sample/<name>_..."""
        trainer, folder = run.trainer, self.stem.parent / "sample"
        epochs = self.options.sample_every_n_epochs
        epoch = run.step // self.steps_per_epoch if epochs else None
        stamp = time.strftime("%Y%m%d%H%M%S")
        for number, prompt in enumerate(self.prompts):
            seed = trainer.seed if prompt.seed is None else prompt.seed
            with own_randomness(trainer.device, seed), torch.no_grad():
                image = draw_prompt(
                    trainer.pipeline,
                    prompt,
                    trainer.encode_prompts,
                    native_resolution(trainer.pipeline),
                    self.options.sample_sampler,
                    trainer.seed,
                    trainer.prediction_type,
                    self.options.zero_terminal_snr,
                )
            name = sample_file_name(self.stem.name, number, prompt.seed, run.step, epoch, stamp)
            facts = {"prompt": prompt.prompt, "seed": str(seed), "step": str(run.step)}
            save_picture(folder / name, image, facts)


@contextmanager
def showing(run: TaskRun) -> Iterator[None]:
    """The model as it would be delivered, without dropout, while the block lasts.

    Optimizers that exchange two sets of weights get theirs back to the last bit.
    """
    kept = [p.detach().clone() for p in run.parameters] if has_modes(run.optimizer) else []
    run.trainer.adapted.eval()
    set_mode(run.optimizer, "eval")
    try:
        yield
    finally:
        set_mode(run.optimizer, "train")
        run.trainer.adapted.train()
        with torch.no_grad():
            for parameter, value in zip(run.parameters, kept, strict=False):
                parameter.copy_(value)


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """torch's global generators seeded for a block and put back after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "sample"))
        yield


def _predict(run: TaskRun, noisy: Tensor, steps: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The trained model's output, in this process alone."""
    with run.accelerator.autocast():
        return run_unet(run.trainer.adapted, noisy, steps, batch, run.trainer.dtype)
