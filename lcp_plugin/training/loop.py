"""The loop of one task. Hooks are called where DESIGN says.

Every draw is derived from (seed, task.index, step, global micro-batch index): with p processes and
accumulation a,
micro-batch m of step s on rank r is number (s a + m) p + r, so p processes see what one with
accumulation a p sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import NumericError
from lcp_plugin.hooks import Item, Rehearsal, StepReport, Strategy
from lcp_plugin.sdxl.conditioning import make_time_ids
from lcp_plugin.sdxl.flat_factors import JoinedGroups
from lcp_plugin.sdxl.live import LiveModel, LiveStep
from lcp_plugin.sdxl.load import native_resolution
from lcp_plugin.sdxl.loss import LossSettings
from lcp_plugin.sdxl.noise import (
    NoiseSettings,
    add_noise,
    draw_timesteps,
    make_noise,
    make_target,
    perturb_noise,
    send,
)
from lcp_plugin.sdxl.precision import allow_half_gradients, peak_memory_mb, set_mode
from lcp_plugin.sdxl.sites import limit_norms
from lcp_plugin.sdxl.trajectory import in_parts
from lcp_plugin.seeds import derive_seed
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task, TaskRecord
from lcp_plugin.training.milestones import Interim
from lcp_plugin.training.optimizers import OptimizerChoice, create_optimizer
from lcp_plugin.training.processes import meets_always, share_object, share_state, share_tensors
from lcp_plugin.training.schedules import RateSchedule, make_course
from lcp_plugin.training.state import apply_state, collect_state, newest_state

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcp_plugin.training.trainer import Trainer

REMEDIES = "lower learning_rate, train with mixed_precision=bf16 or no, or look at the images"


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


class TaskRun:
    """One task's loop."""

    def __init__(
        self,
        trainer: Trainer,
        task: Task,
        options: Options,
        data: TaskData,
        strategy: Strategy,
        store: RunStore,
        on_step: Callable[[StepReport], None],
        sampler: Callable[[Sequence[str], int], list[Image]],
        observer_state: Callable[[], dict[str, Any]],
        learned: tuple[TaskRecord, ...] = (),
    ) -> None:
        self.trainer, self.task, self.options, self.data = trainer, task, options, data
        self.strategy, self.store, self.on_step = strategy, store, on_step
        self.observer_state, self.sample = observer_state, sampler
        self.accelerator = trainer.accelerator
        self.accumulation = options.gradient_accumulation_steps
        self.noise, self.loss = NoiseSettings.of(options), LossSettings.of(options)
        self.total = data.total_steps(int(self.accelerator.num_processes))
        self.facts: dict[str, Any] = {}
        self.step = 0
        self.start_hash = ""  # of the frozen base that the task starts on
        self.interim: Interim | None = None
        self.validation: list[list[float]] = []  # [step, loss]
        self.optimizer_name = ""
        self.model = LiveModel(
            trainer.adapted,
            trainer.dtype,
            trainer.device,
            self.accelerator.autocast,
            trainer.alphas,
            trainer.prediction_type,
            task,
            learned,
            self,
        )
        self.joined: JoinedGroups | None = None

    def prepare(self) -> None:
        """Optimizer, processes, the strategy's own preparation, and the state of an interrupted
        run.
        """
        adapted = self.trainer.adapted
        adapted.eval()
        self.strategy.before_training(self.model)
        choice = OptimizerChoice.of(self.options)
        groups = self.trainer.make_groups(self.options)
        self.parameters = [p for group in groups for p in group["params"]]
        if adapted.flat is not None and choice.joins_exactly:
            self.joined = JoinedGroups(groups, adapted.flat)
            groups = self.joined.groups
        optimizer, self.optimizer_name = create_optimizer(choice, groups)
        self.model.wrapped, self.optimizer = self.accelerator.prepare(adapted, optimizer)
        rates = [float(group.get("lr") or 0.0) for group in optimizer.param_groups]
        self.course = make_course(RateSchedule.of(self.options), self.total, rates)
        if self.options.full_fp16 and self.accelerator.scaler is not None:
            allow_half_gradients(self.accelerator.scaler)
        self._resume()
        adapted.train()
        set_mode(self.optimizer, "train")
        if self.interim is not None:
            processes = int(self.accelerator.num_processes)
            self.interim.plan(self.total, self.data.steps_per_epoch(processes))

    def loop(self) -> None:
        """Steps until the task's total, a NaN, or a request to stop."""
        batches = self._batches()
        if self.step == 0:
            self._visit()
        while self.step < self.total:
            began = time.monotonic()
            measured, live = self._accumulate(batches)
            self._update(live)
            loss, objective, rehearsal = measured.tolist()  # the step's one wait for the device
            self._check_finite(objective)
            self.step += 1
            self.on_step(
                StepReport(
                    task=self.task,
                    index=self.step,
                    total=self.total,
                    loss=loss,
                    objective=objective,
                    lr=float(self.optimizer.param_groups[0].get("lr") or 0.0),
                    seconds=time.monotonic() - began,
                    peak_memory_mb=peak_memory_mb(self.trainer.device),
                    rehearsal=None if math.isnan(rehearsal) else rehearsal,
                )
            )
            self._visit()
            self._save_if_due()

    def _visit(self) -> None:
        if self.interim is not None:
            self.interim.visit(self)

    def finish(self) -> None:
        """The strategy's last look at the live model."""
        if self.interim is not None:
            self.interim.finish(self)
        self.trainer.adapted.eval()
        set_mode(self.optimizer, "eval")
        self.strategy.after_training(self.model)
        self.facts["steps"] = self.step
        if self.validation:
            self.facts["validation"] = self.validation

    # ------------------------------------------------------------------------------ one step

    def _accumulate(self, batches: Iterator[Mapping[str, Any]]) -> tuple[Tensor, LiveStep]:
        """Gradients of a step; [loss, objective, rehearsal or NaN] on the device, and the last
        micro-batch.
        """
        losses, objectives = [], []
        live: LiveStep | None = None
        if self.joined is not None:
            self.joined.open()
        rehearsal = None
        for micro in range(self.accumulation):
            batch = next(batches)
            if micro == 0:
                rehearsal = self._rehearse(batch)
            last = micro == self.accumulation - 1
            with self._meeting(last), self._own_randomness("dropout", micro):
                loss, live = self._forward(batch, micro)
                objective = self.strategy.before_backward(live, loss)
                self.accelerator.backward(objective / self.accumulation)
            losses.append(loss.detach())
            objectives.append(objective.detach())
        assert live is not None
        objective = torch.stack(objectives).mean()
        if rehearsal is None:
            rehearsed = objective.new_tensor(math.nan)
        else:
            rehearsed, weight = rehearsal
            objective = objective + weight * rehearsed
        means = torch.stack([torch.stack(losses).mean(), objective, rehearsed])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        return means, live

    def _meeting(self, last: bool) -> AbstractContextManager[None]:
        """Processes add up their gradients behind the last pass of a step only."""
        meets = last or meets_always(self.accelerator)
        waits = self.accelerator.no_sync(self.model.wrapped)
        return nullcontext() if meets else cast(AbstractContextManager[None], waits)

    def _rehearse(self, batch: Mapping[str, Any]) -> tuple[Tensor, float] | None:
        """A strategy's examples of earlier tasks: forward and backward, in pieces of the task's
        batch size; their mean squared error and its weight.
        """
        empty = torch.empty(0)
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        draws = self._generator("rehearsal", 0)
        step = LiveStep(self.model, self.step, self.total, tensors, empty, empty, empty, draws)
        rehearsal = self.strategy.rehearse(step)
        if rehearsal is None:
            return None
        rows, total = len(rehearsal.latents), torch.zeros((), device=self.trainer.device)
        for number, part in enumerate(in_parts(rows, len(batch["time_ids"]))):
            with self._meeting(last=False), self._own_randomness("rehearsal dropout", number):
                error = self._rehearsal_error(rehearsal, part)
                share = len(rehearsal.timesteps[part]) / rows
                self.accelerator.backward(rehearsal.weight * share * error)
            total += share * error.detach()
        return total, rehearsal.weight

    def _rehearsal_error(self, rehearsal: Rehearsal, part: slice) -> Tensor:
        device = self.trainer.device
        conditioning = {k: send(v[part], device) for k, v in rehearsal.conditioning.items()}
        if self.options.trains_text_encoders and rehearsal.prompts:
            conditioning |= self.trainer.encode_live(list(rehearsal.prompts)[part])
        latents, target = (send(t[part], device) for t in (rehearsal.latents, rehearsal.target))
        timesteps = send(rehearsal.timesteps[part], device)
        return (self.model.predict(latents, timesteps, conditioning) - target).square().mean()

    def _forward(self, batch: Mapping[str, Any], micro: int) -> tuple[Tensor, LiveStep]:
        tensors = self.on_device(batch)
        generator = self._generator("noise", micro)
        latents = tensors["latents"]
        noise = make_noise(latents, self.noise, generator)
        alphas, kind = self.trainer.alphas, self.trainer.prediction_type
        timesteps = draw_timesteps(len(latents), self.noise, len(alphas), generator)
        timesteps = send(timesteps, latents.device)
        noise_in = perturb_noise(noise, self.noise, generator)
        noisy = add_noise(latents, noise_in, timesteps, alphas)
        target = make_target(latents, noise, timesteps, alphas, kind)
        target = self._preserve(target, noisy, timesteps, tensors)
        prediction = self.model.predict(noisy, timesteps, tensors)
        loss = self.trainer.measure_loss(prediction, target, timesteps, tensors, self.loss)
        live = LiveStep(
            self.model,
            self.step,
            self.total,
            {**tensors, "noise": noise, "noisy_latents": noisy},
            prediction,
            target,
            timesteps,
            self._generator("strategy", micro),
        )
        return loss, live

    def _preserve(
        self, target: Tensor, noisy: Tensor, timesteps: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Differential output preservation: images that ask for it have what the model said before
        this task as their target (kohya's diff_output_preservation).
        """
        if "preserve" not in batch:
            return target
        before = self.model.predict(noisy, timesteps, batch, "carry")
        return torch.where(batch["preserve"].view(-1, 1, 1, 1), before, target)

    def _update(self, live: LiveStep) -> None:
        accelerator, optimizer = self.accelerator, self.optimizer
        for group, rate in zip(optimizer.param_groups, self.course(self.step), strict=True):
            if group.get("lr") is not None:
                group["lr"] = rate
        self.trainer.adapted.forget_rounded()
        if self.joined is not None:
            self.joined.collect()
        accelerator.unscale_gradients(optimizer)
        self.strategy.before_optimizer_step(live)
        if self.options.max_grad_norm > 0:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.options.max_grad_norm)  # unscaled above
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.joined is not None:
            self.joined.clear()
        if self.options.scale_weight_norms:
            limit_norms(self.trainer.adapted.pair_of.values(), self.options.scale_weight_norms)
        with torch.no_grad():
            self.strategy.after_optimizer_step(live)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = "nothing was learned so far"
            if self.store.holds_work():
                kept = "what was learned before is kept (other settings start over: --overwrite)"
            raise NumericError(
                f"the loss of task {self.task.name} became {loss} at step "
                f"{self.step + 1}; {kept}. Try: {REMEDIES}."
            )

    # --------------------------------------------------------------------------- randomness

    def _micro_index(self, micro: int) -> int:
        world = int(self.accelerator.num_processes)
        return (self.step * self.accumulation + micro) * world + int(self.accelerator.process_index)

    def _generator(self, purpose: str, micro: int) -> torch.Generator:
        seed = derive_seed(self.trainer.seed, purpose, self.task.index, self._micro_index(micro))
        return torch.Generator().manual_seed(seed)

    @contextmanager
    def _own_randomness(self, purpose: str, micro: int) -> Iterator[None]:
        """Dropout draws from torch's global generator: seeded for this micro-batch, restored
        after.
        """
        device = self.trainer.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(
                derive_seed(self.trainer.seed, purpose, self.task.index, self._micro_index(micro))
            )
            yield

    # --------------------------------------------------------------------------------- data

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        world = int(self.accelerator.num_processes)
        return self.data.loader(
            start=self.step * self.accumulation * world,
            stop=self.total * self.accumulation * world,
            workers=self.options.max_data_loader_n_workers,
            stride=world,
            offset=int(self.accelerator.process_index),
        )

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch of TaskData with everything encoded, on the device."""
        ready = dict(batch)
        if "pixels" in ready:
            ready["latents"] = self.trainer.encode_images(ready.pop("pixels"))
        if "captions" in ready:
            trains = self.options.trains_text_encoders
            encode = self.trainer.encode_live if trains else self.trainer.encode_prompts
            ready.update(encode(ready.pop("captions")))
        device = self.trainer.device
        return {k: send(v, device) for k, v in ready.items() if isinstance(v, Tensor)}

    # What the live model is lent (sdxl.live.Desk); `sample` is the run's own.

    def generator(self, purpose: str) -> torch.Generator:
        """For a strategy's draws outside of steps, derived from (seed, task, purpose)."""
        seed = derive_seed(self.trainer.seed, purpose, self.task.index)
        return torch.Generator().manual_seed(seed)

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar on a terminal and the time left."""
        from tqdm import tqdm

        quiet = None if self.accelerator.is_main_process and len(items) else True
        yield from tqdm(items, desc=what, unit="task", leave=False, disable=quiet)

    def sizes(self) -> list[tuple[int, int]]:
        """Latent sizes (h, w) of the task's buckets, the most frequent first."""
        factor = int(self.trainer.pipeline.vae_scale_factor)
        counts = self.data.bucket_counts
        ordered = sorted(counts, key=lambda bucket: (-counts[bucket], bucket))
        return [(height // factor, width // factor) for width, height in ordered]

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What rank 0 finds beside the task's state, or makes and leaves there, on every rank."""
        made = None
        if self.accelerator.is_main_process:
            made = self.store.read_kept(self.task, name)
            if made is None:
                made = make()
                self.store.write_kept(self.task, name, made)
        return share_tensors(self.accelerator, made)

    def examples(self) -> Iterator[Mapping[str, Tensor]]:
        for k in range(self.data.num_batches_per_epoch):
            yield self.on_device(self.data.batch(k))

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Conditioning of prompts on the device, for images of a latent size."""
        encoded: dict[str, Tensor] = self.trainer.encode_prompts(prompts)
        side = native_resolution(self.trainer.pipeline)
        factor = int(self.trainer.pipeline.vae_scale_factor)
        size = (side, side) if size is None else (size[0] * factor, size[1] * factor)
        encoded["time_ids"] = make_time_ids(size, (0, 0), size).expand(len(prompts), -1)
        return {k: send(v, self.trainer.device) for k, v in encoded.items()}

    # -------------------------------------------------------------------------------- state

    def _save_if_due(self) -> None:
        every = self.options.resume_every_n_steps
        stop = self.trainer.stop_requested()
        if self.accelerator.num_processes > 1:
            stop = bool(share_object(self.accelerator, stop))
        due = every > 0 and self.step % every == 0 and self.step < self.total
        if (due or stop) and self.accelerator.is_main_process:
            self.save_state()
        if stop:
            self.accelerator.wait_for_everyone()
            raise Interrupted(
                f"stopped at step {self.step} of {self.total} of task {self.task.name}; "
                "the same command goes on from there."
            )

    def save_state(self) -> None:
        """Factors, optimizer, scaler, strategy and observers, so that the next step can be the
        same.
        """
        parts, facts = collect_state(self)
        self.store.save_state(self.task, self.step, parts, facts)

    def _resume(self) -> None:
        found = share_state(
            self.accelerator,
            lambda: newest_state(
                lambda: self.store.read_state(self.task),
                self.trainer.options.resume,
                self.task.index,
            ),
        )
        if found is not None:
            apply_state(self, found)
