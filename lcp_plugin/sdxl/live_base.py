"""The base as loaded: one implementation for training, samples, validation, images and losses.

W_0 (base_weights included) with room for a frozen delta and one adapter, the VAE as a codec, both
text encoders, the noise schedule, and the type that all of it is computed in. A base is made whole
by `build_live_base` (a run's options) or by the constructor, and its parts never change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lcp_plugin.biases import Change
from lcp_plugin.config.options import Options
from lcp_plugin.hooks import Conditioning
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet, run_unet
from lcp_plugin.sdxl.base_weights import add_to_base, read_base_weights
from lcp_plugin.sdxl.conditioning import PromptBank, encode_prompts, make_time_ids
from lcp_plugin.sdxl.devices import widest_float
from lcp_plugin.sdxl.drawing import DrawSettings, decode_latents, draw_images
from lcp_plugin.sdxl.latents import encode_pixels
from lcp_plugin.sdxl.load import native_resolution, prediction_type, without_zero_terminal
from lcp_plugin.sdxl.long_prompts import TextRules, encode_long_prompts
from lcp_plugin.sdxl.noise import NoiseSchedule, alphas_cumprod, send, zero_terminal_betas
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

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class LiveBase:
    """A base in memory, its UNet on the device. `adapt_pipeline` makes `adapted`."""

    pipeline: StableDiffusionXLPipeline
    adapted: AdaptedUNet
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype = torch.float32  # what the UNet is computed in
    home: str = "cpu"  # where VAE and text encoders wait until they are needed
    carry_as: str = "auto"  # how a delta sits in the base: auto | branch | fuse
    texts: TextRules = TextRules()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    bank: PromptBank = field(default_factory=PromptBank)  # prompts of images

    @property
    def native_side(self) -> int:
        """Pixels per side that the base was made for."""
        return native_resolution(self.pipeline)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""
        return int(self.pipeline.vae_scale_factor)

    def show(self, change: Change, measure: bool = True) -> None:
        """Puts the model on W_0 + change, without an adapter.

        Args:
            measure: what rounding loses, so that training from there need not set it once more.
        """
        stale = self.adapted.changes_texts
        self.adapted.detach()
        self.adapted.set_base(change.delta, self.carry_as, measure)
        self.adapted.biases.set(change.biases)
        self.adapted.eval()
        if stale or self.adapted.changes_texts:
            self.bank.clear()

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        through: nn.Module | None = None,
    ) -> Tensor:
        """The UNet's output (b, 4, h, w), fp32, of the model as it is.

        Args:
            through: the model as prepared for several processes.
        """
        with self.autocast():
            unet = self.adapted if through is None else through
            return run_unet(unet, latents, timesteps, conditioning, self.dtype)

    # ------------------------------------------------------------------------------ the VAE

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents (b, 4, h/f, w/f) of pixels (b, 3, h, w) in [-1, 1]: the mean, in fp32."""
        return encode_pixels(self.pipeline.vae.to(self.device), pixels)

    def decode(self, latents: Tensor) -> list[Image]:
        """Images of scaled latents (n, 4, h, w)."""
        return decode_latents(self.pipeline, latents)

    def rest_vae(self) -> None:
        """The VAE waits at home; whoever needs it moves it back."""
        self.pipeline.vae.to(self.home)

    # ---------------------------------------------------------------------------- the texts

    @contextmanager
    def text_encoders(self) -> Iterator[None]:
        """Text encoders on the device for a while."""
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        for encoder in encoders:
            encoder.to(self.device)
        yield
        for encoder in encoders:
            encoder.to(self.home)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts without time_ids, on the CPU."""
        with self.text_encoders(), torch.no_grad():
            return {k: v.cpu() for k, v in self._encode(prompts).items()}

    def encode_live(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What `encode_prompts` gives, on the device, where text encoders stay; with gradients."""
        for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            encoder.to(self.device)
        with self.autocast():
            return self._encode(prompts)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.texts.are_plain:
            return encode_prompts(self.pipeline, prompts)
        length, weighted = self.texts.max_tokens, self.texts.weighted
        return encode_long_prompts(self.pipeline, list(prompts), length, weighted)

    def condition(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Whole conditioning of prompts on the device, for images of a latent size (h, w)."""
        encoded = self.encode_prompts(prompts)
        side, factor = self.native_side, self.vae_factor
        size = (side, side) if size is None else (size[0] * factor, size[1] * factor)
        encoded["time_ids"] = make_time_ids(size, (0, 0), size).expand(len(prompts), -1)
        return {k: send(v, self.device) for k, v in encoded.items()}

    # --------------------------------------------------------------------------- both at once

    def complete(self, batch: Mapping[str, Any], trains_texts: bool = False) -> dict[str, Tensor]:
        """A batch of TaskData on the device, what it lacks encoded: pixels and captions."""
        ready = dict(batch)
        if "pixels" in ready:
            ready["latents"] = self.encode_images(ready.pop("pixels"))
        if "captions" in ready:
            encode_texts = self.encode_live if trains_texts else self.encode_prompts
            ready.update(encode_texts(ready.pop("captions")))
        return {k: send(v, self.device) for k, v in ready.items() if isinstance(v, Tensor)}

    def draw(self, prompts: Sequence[str], latents: Tensor, how: DrawSettings) -> list[Image]:
        """An image per prompt and starting latent, of the model as it is but for dropout."""
        with self.text_encoders():
            self.bank.add(self._encode, [*prompts, how.negative])
        training = self.adapted.training
        self.adapted.eval()
        asked, empty = self.bank(prompts), self.bank([how.negative])
        images = draw_images(self.pipeline, asked, empty, latents, how)
        self.adapted.train(training)
        return images


# ------------------------------------------------------------------------------------ building


def build_live_base(
    options: Options,
    pipeline: StableDiffusionXLPipeline,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> LiveBase:
    """The base as a run's options ask for it: base_weights, precision, schedule, attention."""
    precision = Precision.of(options)
    dtype, small = precision.computed, precision.keeps_small
    warn_of_slow_half(dtype, device)
    pipeline.unet.to(device)
    adapted = adapt_pipeline(pipeline)
    add_to_base(adapted.layers, read_base_weights(options), fuse=precision.is_full)
    shrink_base(pipeline, precision)
    spare_from_sharing(adapted)
    schedule = settle_schedule(
        pipeline, device, options.v_parameterization, options.zero_terminal_snr
    )
    if options.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    use_attention(pipeline.unet, choose_attention(options))
    if options.torch_compile:
        compile_unet(pipeline.unet, options.dynamo_backend)
        adapted.shares_casts = False  # else each step's casts would be compiled in
    adapted.plain = dtype is not torch.float32 and not small
    return LiveBase(
        pipeline=pipeline,
        adapted=adapted,
        schedule=schedule,
        device=device,
        dtype=dtype,
        carry_as="branch" if small else options.carry_as,  # what is stored smaller takes no delta
        texts=TextRules(options.max_token_length, options.weighted_captions),
        autocast=autocast,
    )


def adapt_pipeline(pipeline: StableDiffusionXLPipeline) -> AdaptedUNet:
    """A pipeline's UNet and text encoders, ready for deltas and an adapter."""
    return AdaptedUNet(
        {
            "unet": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
    )


def settle_schedule(
    pipeline: StableDiffusionXLPipeline,
    device: torch.device,
    v_prediction: bool = False,
    zero_terminal: bool | None = None,
) -> NoiseSchedule:
    """The noise schedule, and the pipeline's scheduler set to draw under it.

    Args:
        v_prediction: whatever the base's own files say.
        zero_terminal: betas that end in pure noise, or betas as they were before a base rescaled
            them; None: the base's own.
    """
    if zero_terminal is not None:
        without_zero_terminal(pipeline)  # betas are rescaled once
    betas = torch.as_tensor(pipeline.scheduler.betas).float()
    if v_prediction:
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    kind = prediction_type(pipeline)
    if zero_terminal:  # images must start from pure noise too
        betas = zero_terminal_betas(betas)
        pipeline.scheduler = create_sampler(
            "euler", pipeline.scheduler, kind, zero_terminal_snr=True
        )
    alphas = alphas_cumprod(betas).to(widest_float(device)).to(device)
    return NoiseSchedule(alphas, kind, bool(zero_terminal))
