"""Precision, attention and memory on the machine at hand."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lcp_plugin.config.options import Options
from lcp_plugin.formats.disk import first_line
from lcp_plugin.formats.precisions import HALVES
from lcp_plugin.sdxl.stored import FLOAT8, is_native, names_of_stored, store_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """The types that a run computes in, and keeps its weights in; fp32 throughout by default."""

    computed: torch.dtype = torch.float32  # what the frozen base is computed in
    loaded: torch.dtype = torch.float32  # what it is loaded in
    factors: torch.dtype = torch.float32  # of what is trained
    unet_in_float8: bool = False
    texts_in_float8: bool = False

    @classmethod
    def of(cls, options: Options) -> Precision:
        """What the options ask for: factors in fp32, or as the base with full_fp16, full_bf16."""
        computed = HALVES.get(options.mixed_precision, torch.float32)
        return cls(
            computed=computed,
            loaded=HALVES.get(options.base_dtype, computed),
            factors=computed if options.full_fp16 or options.full_bf16 else torch.float32,
            unet_in_float8=options.fp8_base or options.fp8_base_unet,
            texts_in_float8=options.fp8_base,
        )

    @property
    def keeps_small(self) -> bool:
        """Whether frozen weights are stored in a smaller type than they are computed in."""
        return self.unet_in_float8 or self.loaded is not self.computed

    @property
    def is_full(self) -> bool:
        """Whether the frozen base stays in fp32 throughout."""
        return self.computed is torch.float32 and not self.keeps_small


def shrink_base(pipeline: StableDiffusionXLPipeline, precision: Precision) -> None:
    """Frozen weights into what they are stored in: float8 where it is asked for, else as loaded."""
    texts = (pipeline.text_encoder, pipeline.text_encoder_2)
    eight = (precision.unet_in_float8, *[precision.texts_in_float8] * len(texts))
    for model, in_float8 in zip((pipeline.unet, *texts), eight, strict=True):
        if in_float8 or precision.loaded is not precision.computed:
            store_weights(model.modules(), FLOAT8 if in_float8 else precision.loaded)
            model.to(precision.computed)


def warn_of_slow_half(dtype: torch.dtype, device: torch.device) -> None:
    """One line where the arithmetic asked for is emulated."""
    if device.type == "cpu" and not is_native(dtype):
        name = next(word for word, half in HALVES.items() if half is dtype)
        log.warning(
            "this CPU cannot multiply %s itself: a step takes dozens of times longer than in fp32. "
            "--mixed_precision no --base_dtype %s keeps the base as small and computes in fp32.",
            name,
            name,
        )


def spare_from_sharing(model: nn.Module) -> None:
    """Stored weights are alike in every process and have no gradient: nothing to broadcast."""
    names = names_of_stored(model)
    if names:
        setattr(model, "_ddp_params_and_buffers_to_ignore", names)  # noqa: B010


def allow_half_gradients(scaler: Any) -> None:
    """full_fp16: lets the gradient scaler unscale gradients that are fp16 themselves.

    torch refuses that, since they may overflow; kohya's trainer allows it in the same way.
    """
    unscale = scaler._unscale_grads_

    def unscale_half(optimizer: Any, inverse: Any, found: Any, allow_fp16: bool) -> Any:
        return unscale(optimizer, inverse, found, True)

    scaler._unscale_grads_ = unscale_half


def choose_attention(options: Options) -> str:
    """xformers if asked for, else torch's SDPA; plain products where that is switched off."""
    if options.xformers:
        return "xformers"
    return "sdpa" if options.sdpa or options.mem_eff_attn else "plain"


def use_attention(unet: Any, wanted: str) -> str:
    """xformers, sdpa (the UNet as it comes), or plain matrix products. Returns what is used:
    SDPA, with one warning, where xformers is unusable here.
    """
    if wanted == "sdpa":
        return wanted
    if wanted == "plain":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
        return wanted
    try:
        import xformers.ops

        query = torch.zeros(1, 8, 1, 8, device=unet.device, dtype=unet.dtype)
        xformers.ops.memory_efficient_attention(query, query, query)
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    except Exception as error:
        reason = first_line(error, 300)
        log.warning("xformers is unusable here (%s): SDPA instead.", reason)
        return "sdpa"


def compile_unet(unet: nn.Module, backend: str) -> None:
    """torch_compile, in place. Hooks are watched, which torch leaves out by default: else an
    adapter that is put on later would not be seen.
    """
    import torch._dynamo as dynamo

    dynamo.config.skip_nnmodule_hook_guards = False
    unet.compile(backend=backend)


def peak_memory_mb(device: torch.device) -> float:
    """Peak of the GPU's allocated memory, or of the process on a CPU, in MB; on MPS, which counts
    no peak, what its driver holds: it is given back late.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
