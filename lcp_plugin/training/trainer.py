"""The live model of a run, and the training of one task on it: W_0 + start.base frozen,
start.adapter trained (the loop is task_run's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.config.options import Options
from lcp_plugin.config.rates import part_rate
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Carry, StepReport, Strategy, TaskStart
from lcp_plugin.run.network_weights import read_network_weights
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.sdxl.base_weights import add_to_base, read_base_weights
from lcp_plugin.sdxl.conditioning import encode_prompts
from lcp_plugin.sdxl.latents import encode_pixels
from lcp_plugin.sdxl.layers import layer_kernel, layer_shape
from lcp_plugin.sdxl.load import prediction_type, without_zero_terminal
from lcp_plugin.sdxl.long_prompts import encode_long_prompts
from lcp_plugin.sdxl.loss import LossSettings, LossWeights, compute_loss
from lcp_plugin.sdxl.noise import (
    NoiseSchedule,
    alphas_cumprod,
    zero_terminal_betas,
)
from lcp_plugin.sdxl.precision import (
    Precision,
    choose_attention,
    compile_unet,
    shrink_base,
    spare_from_sharing,
    use_attention,
    warn_of_slow_half,
)
from lcp_plugin.sdxl.samplers import create_sampler
from lcp_plugin.sdxl.sites import LoraPair
from lcp_plugin.sdxl.targets import (
    Target,
    TargetSettings,
    group_by_rate,
    select_targets,
    special_alphas,
    special_ranks,
)
from lcp_plugin.seeds import derive_seed
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task, TaskRecord
from lcp_plugin.training.loop import TaskRun
from lcp_plugin.training.milestones import Interim

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image


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
        self.precision = Precision.of(options)
        self.dtype = self.precision.computed
        warn_of_slow_half(self.dtype, self.device)
        pipeline.unet.to(self.device)
        self.adapted = AdaptedUNet(
            {
                "unet": pipeline.unet,
                "text_encoder": pipeline.text_encoder,
                "text_encoder_2": pipeline.text_encoder_2,
            }
        )
        self.file = read_network_weights(options)
        exact = self.precision.is_full
        add_to_base(self.adapted.layers, read_base_weights(options), fuse=exact)
        shrink_base(pipeline, self.precision)
        spare_from_sharing(self.adapted)
        without_zero_terminal(pipeline)  # the option decides; betas are rescaled once
        betas = torch.as_tensor(pipeline.scheduler.betas).float()
        betas = zero_terminal_betas(betas) if options.zero_terminal_snr else betas
        self.alphas = alphas_cumprod(betas).to(self.device)  # (train timesteps,)
        self.prediction_type = prediction_type(pipeline)
        if options.v_parameterization:
            self.prediction_type = "v_prediction"
            pipeline.scheduler.register_to_config(prediction_type="v_prediction")
        if options.zero_terminal_snr:  # samples must start from pure noise too
            pipeline.scheduler = create_sampler(
                "euler", pipeline.scheduler, self.prediction_type, zero_terminal_snr=True
            )
        if options.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        use_attention(pipeline.unet, choose_attention(options))
        if options.torch_compile:
            compile_unet(pipeline.unet, options.dynamo_backend)
            self.adapted.shares_casts = False  # else each step's casts would be compiled in
        self.adapted.plain = self.dtype is not torch.float32 and not self.precision.keeps_small

    @property
    def carry_as(self) -> str:
        """How a delta sits in the base: weights stored smaller than computed take none."""
        return "branch" if self.precision.keeps_small else self.options.carry_as

    # ------------------------------------------------------------------------------- the task

    def select(self, options: Options) -> dict[str, Target]:
        """The modules that a task with these options trains, and how.

        With dim_from_weights those of network_weights, at their ranks and alphas.
        """
        settings = TargetSettings.of(options)
        chosen = select_targets(self.adapted.layers, settings)
        if self.file is None or not options.dim_from_weights:
            return chosen
        return {
            name: Target(f.rank, f.alpha, (chosen.get(name) or settings.of_part(name)).rates)
            for name, f in self.file.adapter.items()
            if part_rate(name, settings.rates) > 0
        }

    def spec(self, task: Task, options: Options) -> AdapterSpec:
        """What a fresh adapter of this task looks like."""
        targets = self.select(options)
        self.adapted.check_fits(self.file.adapter if self.file is not None else {})
        layers = {name: self.adapted.layers[name] for name in targets}
        kernels = {name: layer_kernel(layer) for name, layer in layers.items()}
        return AdapterSpec(
            shapes={name: layer_shape(layer) for name, layer in layers.items()},
            rank=options.rank,
            alpha=options.alpha,
            seed=derive_seed(self.seed, "adapter", task.index),
            ranks=special_ranks(targets, options.rank),
            alphas=special_alphas(targets, options.alpha),
            kernels={name: kernel for name, kernel in kernels.items() if kernel is not None},
        )

    def make_groups(self, options: Options) -> list[dict[str, Any]]:
        """Optimizer groups of the attached factors. Raises ConfigError if nothing trains."""
        chosen, settings = self.select(options), TargetSettings.of(options)
        pairs = self.adapted.pair_of
        targets = {name: chosen.get(name) or settings.of_part(name) for name in pairs}
        return group_by_rate({n: (p.down, p.up) for n, p in pairs.items()}, targets)

    def measure_loss(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        batch: Mapping[str, Tensor],
        settings: LossSettings,
    ) -> Tensor:
        """The loss of a micro-batch   # scalar, fp32."""
        schedule = NoiseSchedule(self.alphas, self.prediction_type)
        weights = LossWeights.of(batch)
        return compute_loss(prediction, target, timesteps, schedule, settings, weights)

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
        interim: Interim | None = None,
        learned: tuple[TaskRecord, ...] = (),
    ) -> Trained:
        """Trains `start.adapter` and returns its factors.

        Raises:
            NumericError: a loss is not finite; the last saved state stays.
            Interrupted: a stop was requested; the state is saved.
            ResumeError: a saved state was made from other images or another optimizer.
        """
        fused = self.adapted.set_base(start.base, self.carry_as)
        self.adapted.set_carry(start.base if total is start.base else total)
        self.adapted.attach(start.adapter, start.trainable, Precision.of(options).factors)
        set_dropout(self.adapted.pair_of.values(), options)
        run = TaskRun(
            self, task, options, data, strategy, store, on_step, sampler, observer_state, learned
        )
        run.interim = interim
        if options.resume or options.save_state or options.save_state_on_train_end:
            run.start_hash = hash_carry(Carry(start.base))
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
        return encode_pixels(self.pipeline.vae.to(self.device), pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts without time_ids, on the CPU."""
        with self.text_encoders(), torch.no_grad():
            return {k: v.cpu() for k, v in self._encode(prompts).items()}

    def encode_live(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `encode_prompts`, on the device, where text encoders stay; with gradients."""
        for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            encoder.to(self.device)
        with self.accelerator.autocast():
            return self._encode(prompts)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        options = self.options
        if (options.max_token_length or 75) == 75 and not options.weighted_captions:
            return encode_prompts(self.pipeline, prompts)
        length, weighted = options.max_token_length, options.weighted_captions
        return encode_long_prompts(self.pipeline, list(prompts), length, weighted)


def set_dropout(pairs: Iterable[LoraPair], options: Options) -> None:
    """network_dropout, and rank_dropout and module_dropout of network_args."""
    args = options.network
    for pair in pairs:
        pair.dropout = options.network_dropout or 0.0
        pair.rank_dropout = args.rank_dropout or 0.0
        pair.module_dropout = args.module_dropout or 0.0
