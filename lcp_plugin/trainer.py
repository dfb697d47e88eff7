"""Training of one task: W_0 + start.base frozen, start.adapter trained, hooks called where DESIGN
says.

Every draw is derived from (seed, task.index, step, global micro-batch index): with p processes and
accumulation a,
micro-batch m of step s on rank r is number (s a + m) p + r, so p processes see what one with
accumulation a p sees.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, NumericError, ResumeError
from lcp_plugin.hooks import StepReport, Strategy, TaskStart
from lcp_plugin.optim import create_optimizer, flatten_state, unflatten_state
from lcp_plugin.parallel import share_object, share_state
from lcp_plugin.schedules import make_multiplier
from lcp_plugin.sdxl.conditioning import encode_prompts, make_time_ids
from lcp_plugin.sdxl.layers import (
    AdaptedUNet,
    choose_targets,
    choose_text_targets,
    layer_kernel,
    layer_shape,
)
from lcp_plugin.sdxl.live import LiveModel, LiveStep
from lcp_plugin.sdxl.load import native_resolution, prediction_type
from lcp_plugin.sdxl.loss import compute_loss
from lcp_plugin.sdxl.noise import (
    add_noise,
    alphas_cumprod,
    draw_timesteps,
    make_noise,
    make_target,
    perturb_noise,
    zero_terminal_betas,
)
from lcp_plugin.seeds import derive_seed
from lcp_plugin.store import RunStore
from lcp_plugin.tasks import Task

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

log = logging.getLogger(__name__)

REMEDIES = "lower learning_rate, train with mixed_precision=bf16 or no, or look at the images"


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Trained:
    """What a task's training gives."""

    adapter: Adapter
    facts: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Holds the live model for a run; `train_task` is called once per task."""

    def __init__(
        self,
        options: Options,
        pipeline: StableDiffusionXLPipeline,
        accelerator: Any,
        seed: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.options, self.pipeline, self.accelerator = options, pipeline, accelerator
        self.seed, self.stop_requested = seed, stop_requested
        self.device: torch.device = accelerator.device
        self.dtype = weight_dtype(options)
        pipeline.unet.to(self.device)
        self.adapted = AdaptedUNet(
            {
                "unet": pipeline.unet,
                "text_encoder": pipeline.text_encoder,
                "text_encoder_2": pipeline.text_encoder_2,
            }
        )
        self.targets: list[str] = []
        if options.trains_unet:
            self.targets += choose_targets(self.adapted.layers, options.lora_targets)
        if options.trains_text_encoders:
            self.targets += choose_text_targets(self.adapted.layers)
        betas = torch.as_tensor(pipeline.scheduler.betas).float()
        betas = zero_terminal_betas(betas) if options.zero_terminal_snr else betas
        self.alphas = alphas_cumprod(betas).to(self.device)  # (train timesteps,)
        self.prediction_type = prediction_type(pipeline)
        if options.v_parameterization:
            self.prediction_type = "v_prediction"
        if options.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        use_attention(pipeline.unet, options)

    # ------------------------------------------------------------------------------- the task

    def spec(self, task: Task, options: Options) -> AdapterSpec:
        """What a fresh adapter of this task looks like."""
        layers = {name: self.adapted.layers[name] for name in self.targets}
        kernels = {name: layer_kernel(layer) for name, layer in layers.items()}
        return AdapterSpec(
            shapes={name: layer_shape(layer) for name, layer in layers.items()},
            rank=options.rank,
            alpha=options.alpha,
            seed=derive_seed(self.seed, "adapter", task.index),
            kernels={name: kernel for name, kernel in kernels.items() if kernel is not None},
        )

    def train_task(
        self,
        task: Task,
        options: Options,
        data: TaskData,
        start: TaskStart,
        total: Delta,
        strategy: Strategy,
        store: RunStore,
        on_step: Callable[[StepReport], None],
        sampler: Callable[[Sequence[str], int], list[Image]],
        observer_state: Callable[[], dict[str, Any]] = dict,
    ) -> Trained:
        """Trains `start.adapter` and returns its factors.

        Raises:
            NumericError: a loss is not finite; the last saved state stays.
            Interrupted: a stop was requested; the state is saved.
            ResumeError: a saved state was made from other images or another optimizer.
        """
        fused = self.adapted.set_base(start.base, options.carry_as)
        self.adapted.set_carry(start.base if total is start.base else total)
        factor_dtype = self.dtype if options.full_fp16 or options.full_bf16 else torch.float32
        self.adapted.attach(start.adapter, start.trainable, factor_dtype)
        for pair in self.adapted.pair_of.values():
            pair.dropout = options.network_dropout or 0.0
        run = TaskRun(self, task, options, data, strategy, store, on_step, sampler, observer_state)
        try:
            run.prepare()
            run.loop()
            run.finish()
            trained = self.adapted.trained()
            trained.check_finite()
        finally:
            self.adapted.detach()
            self.accelerator.free_memory()
        return Trained(trained, {"fused": fused, "optimizer": run.optimizer_name, **run.facts})

    @contextmanager
    def text_encoders(self) -> Iterator[None]:
        """Text encoders on the device for a while."""
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        for encoder in encoders:
            encoder.to(self.device)
        yield
        for encoder in encoders:
            encoder.to("cpu")

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents (b, 4, h/f, w/f) of pixels (b, 3, h, w) in [-1, 1]: the mean, in fp32."""
        vae = self.pipeline.vae.to(self.device)
        with torch.no_grad():
            latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (torch.as_tensor(latents).float() - shift) * float(vae.config.scaling_factor)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts without time_ids, on the CPU."""
        with self.text_encoders(), torch.no_grad():
            return {k: v.cpu() for k, v in encode_prompts(self.pipeline, prompts).items()}

    def encode_live(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `encode_prompts`, on the device, where text encoders stay; with gradients."""
        for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            encoder.to(self.device)
        with self.accelerator.autocast():
            return encode_prompts(self.pipeline, prompts)


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
    ) -> None:
        self.trainer, self.task, self.options, self.data = trainer, task, options, data
        self.strategy, self.store, self.on_step = strategy, store, on_step
        self.observer_state = observer_state
        self.accelerator = trainer.accelerator
        self.accumulation = options.gradient_accumulation_steps
        self.total = count_steps(
            options, data.num_batches_per_epoch, self.accelerator.num_processes
        )
        self.facts: dict[str, Any] = {}
        self.step = 0
        self.optimizer_name = ""
        self.model = LiveModel(
            trainer.adapted,
            trainer.dtype,
            trainer.device,
            self.accelerator.autocast,
            sampler=sampler,
            encoder=self._encode,
            loader=self._examples,
        )

    def prepare(self) -> None:
        """Optimizer, processes, the strategy's own preparation, and the state of an interrupted
        run.
        """
        adapted = self.trainer.adapted
        adapted.eval()
        self.strategy.before_training(self.model)
        groups = make_groups(self.trainer.adapted, self.options)
        optimizer, self.optimizer_name = create_optimizer(
            self.options.optimizer_type,
            self.options.optimizer_args,
            groups,
            self.options.learning_rate,
        )
        self.multiplier = make_multiplier(self.options, self.total)
        self.parameters = [p for group in groups for p in group["params"]]
        self.model.wrapped, self.optimizer = self.accelerator.prepare(adapted, optimizer)
        self.rates = [float(group.get("lr") or 0.0) for group in optimizer.param_groups]
        self._resume()
        adapted.train()

    def loop(self) -> None:
        """Steps until the task's total, a NaN, or a request to stop."""
        batches = self._batches()
        while self.step < self.total:
            began = time.monotonic()
            loss, objective, live = self._accumulate(batches)
            self._update(live)
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
                )
            )
            self._save_if_due()

    def finish(self) -> None:
        """The strategy's last look at the live model."""
        self.trainer.adapted.eval()
        self.strategy.after_training(self.model)
        self.facts["steps"] = self.step

    # ------------------------------------------------------------------------------ one step

    def _accumulate(self, batches: Iterator[Mapping[str, Any]]) -> tuple[float, float, LiveStep]:
        losses, objectives = [], []
        live: LiveStep | None = None
        for micro in range(self.accumulation):
            last = micro == self.accumulation - 1
            waits = nullcontext() if last else self.accelerator.no_sync(self.model.wrapped)
            with waits, self._own_randomness(micro):
                loss, live = self._forward(next(batches), micro)
                objective = self.strategy.before_backward(live, loss)
                self._check_finite(objective)
                self.accelerator.backward(objective / self.accumulation)
            losses.append(loss.detach())
            objectives.append(objective.detach())
        assert live is not None
        means = torch.stack([torch.stack(losses).mean(), torch.stack(objectives).mean()])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        return float(means[0]), float(means[1]), live

    def _forward(self, batch: Mapping[str, Any], micro: int) -> tuple[Tensor, LiveStep]:
        tensors = self._on_device(batch)
        generator = self._generator("noise", micro)
        latents = tensors["latents"]
        noise = make_noise(latents, self.options, generator)
        alphas, kind = self.trainer.alphas, self.trainer.prediction_type
        timesteps = draw_timesteps(len(latents), self.options, len(alphas), generator)
        timesteps = timesteps.to(latents.device)
        noise_in = perturb_noise(noise, self.options, generator)
        noisy = add_noise(latents, noise_in, timesteps, alphas)
        target = make_target(latents, noise, timesteps, alphas, kind)
        prediction = self.model.predict(noisy, timesteps, tensors)
        loss = compute_loss(
            prediction,
            target,
            timesteps,
            alphas,
            self.options,
            kind,
            loss_weights=tensors.get("loss_weights"),
            masks=tensors.get("masks"),
        )
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

    def _update(self, live: LiveStep) -> None:
        accelerator, optimizer = self.accelerator, self.optimizer
        factor = self.multiplier(self.step)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            if group.get("lr") is not None:
                group["lr"] = rate * factor
        accelerator.unscale_gradients(optimizer)
        self.strategy.before_optimizer_step(live)
        if self.options.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.strategy.after_optimizer_step(live)

    def _check_finite(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss).all()):
            raise NumericError(
                f"the loss of task {self.task.name} became {float(loss.detach())} at step "
                f"{self.step + 1}; the last good state is kept. Try: {REMEDIES}."
            )

    # --------------------------------------------------------------------------- randomness

    def _micro_index(self, micro: int) -> int:
        world = int(self.accelerator.num_processes)
        return (self.step * self.accumulation + micro) * world + int(self.accelerator.process_index)

    def _generator(self, purpose: str, micro: int) -> torch.Generator:
        seed = derive_seed(self.trainer.seed, purpose, self.task.index, self._micro_index(micro))
        return torch.Generator().manual_seed(seed)

    @contextmanager
    def _own_randomness(self, micro: int) -> Iterator[None]:
        """Dropout draws from torch's global generator: seeded for this micro-batch, restored
        after.
        """
        device = self.trainer.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(
                derive_seed(self.trainer.seed, "dropout", self.task.index, self._micro_index(micro))
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

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        ready = dict(batch)
        if "pixels" in ready:
            ready["latents"] = self.trainer.encode_images(ready.pop("pixels"))
        if "captions" in ready:
            trains = self.options.trains_text_encoders
            encode = self.trainer.encode_live if trains else self.trainer.encode_prompts
            ready.update(encode(ready.pop("captions")))
        device = self.trainer.device
        return {k: v.to(device) for k, v in ready.items() if isinstance(v, Tensor)}

    def _examples(self) -> Iterator[Mapping[str, Tensor]]:
        for k in range(self.data.num_batches_per_epoch):
            yield self._on_device(self.data.batch(k))

    def _encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        encoded: dict[str, Tensor] = self.trainer.encode_prompts(prompts)
        side = native_resolution(self.trainer.pipeline)
        size = (side, side)
        encoded["time_ids"] = make_time_ids(size, (0, 0), size).expand(len(prompts), -1)
        return {k: v.to(self.trainer.device) for k, v in encoded.items()}

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
        factors = {
            f"{name}.{part}": tensor.detach().cpu().clone()
            for name, pair in self.trainer.adapted.pair_of.items()
            for part, tensor in (("A", pair.down), ("B", pair.up))
        }
        optimizer_tensors, optimizer_rest = flatten_state(self.optimizer.state_dict())
        scaler = self.accelerator.scaler
        parts = {"factors": factors, "optimizer": optimizer_tensors}
        state = self.strategy.state_dict()
        if state:
            parts["strategy"] = state
        self.store.save_state(
            self.task,
            self.step,
            parts,
            {
                "optimizer": optimizer_rest,
                "optimizer_name": self.optimizer_name,
                "scaler": None if scaler is None else scaler.state_dict(),
                "data": self.data.fingerprint,
                "observers": self.observer_state(),
            },
        )

    def _resume(self) -> None:
        found = share_state(self.accelerator, lambda: self.store.read_state(self.task))
        if found is None:
            return
        self.step, parts, facts = found
        if facts["data"] != self.data.fingerprint:
            raise ResumeError(
                f"the images or captions of task {self.task.name} have changed since it was "
                "interrupted; restore them, or delete its state/ folder to start the task again."
            )
        if facts["optimizer_name"] != self.optimizer_name:
            raise ResumeError(
                f"task {self.task.name} was interrupted with {facts['optimizer_name']}, now there "
                f"is "
                f"{self.optimizer_name}; install the same, or delete its state/ folder."
            )
        with torch.no_grad():
            for name, pair in self.trainer.adapted.pair_of.items():
                pair.down.copy_(parts["factors"][f"{name}.A"])
                pair.up.copy_(parts["factors"][f"{name}.B"])
        state = unflatten_state(parts["optimizer"], facts["optimizer"])
        self.optimizer.load_state_dict(state)
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if "strategy" in parts:
            self.strategy.load_state_dict(parts["strategy"])
        log.info("task %s goes on at step %d of %d.", self.task.name, self.step, self.total)


# ------------------------------------------------------------------------------------ helpers


def make_groups(adapted: AdaptedUNet, options: Options) -> list[dict[str, Any]]:
    """Parameter groups {"params", "lr"}: the UNet's, text encoder 1's and 2's; empty ones left out.

    Raises:
        ConfigError: no group has both parameters and a rate above 0.
    """
    text = options.text_encoder_lr or (options.learning_rate,)
    rates = {
        "unet": options.learning_rate if options.unet_lr is None else options.unet_lr,
        "text_encoder": text[0],
        "text_encoder_2": text[-1],
    }
    groups = []
    for component, rate in rates.items():
        parameters = [
            parameter
            for name, pair in adapted.pair_of.items()
            if name.split(".")[0] == component
            for parameter in (pair.down, pair.up)
            if parameter.requires_grad
        ]
        if parameters and rate > 0:
            groups.append({"params": parameters, "lr": rate})
        else:  # as in kohya's trainer: what has no rate does not train
            for parameter in parameters:
                parameter.requires_grad_(False)
    if not groups:
        raise ConfigError(
            "nothing to train: all learning rates are 0; set learning_rate, unet_lr or "
            "text_encoder_lr."
        )
    return groups


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen base."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        options.mixed_precision, torch.float32
    )


def count_steps(options: Options, batches: int, processes: int) -> int:
    """Optimizer steps of a task; max_train_epochs beats max_train_steps, as in kohya's trainer."""
    if options.max_train_epochs:
        per_epoch = math.ceil(batches / options.gradient_accumulation_steps / processes)
        return options.max_train_epochs * per_epoch
    return options.max_train_steps


def use_attention(unet: Any, options: Options) -> str:
    """xformers if asked for and usable here, else torch's SDPA (one warning)."""
    if not options.xformers:
        return "sdpa"
    try:
        import xformers.ops

        query = torch.zeros(1, 8, 1, 8, device=unet.device, dtype=unet.dtype)
        xformers.ops.memory_efficient_attention(query, query, query)
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        log.warning("xformers is unusable here (%s): SDPA instead.", reason)
        return "sdpa"


def peak_memory_mb(device: torch.device) -> float:
    """Peak of the GPU's allocated memory, or of the process on a CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
