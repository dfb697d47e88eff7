"""Precision, attention and memory on the machine at hand."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lcp_plugin.config.options import Options
from lcp_plugin.sdxl.float8 import names_of_stored, store_in_float8

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

log = logging.getLogger(__name__)


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen base."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        options.mixed_precision, torch.float32
    )


def factor_dtype(options: Options) -> torch.dtype:
    """The dtype of the trained factors: fp32, or the base's with full_fp16 and full_bf16."""
    return weight_dtype(options) if options.full_fp16 or options.full_bf16 else torch.float32


def keeps_float8(options: Options) -> bool:
    """Whether any frozen weight is stored in float8."""
    return options.fp8_base or options.fp8_base_unet


def shrink_base(pipeline: StableDiffusionXLPipeline, options: Options) -> None:
    """Frozen weights into float8: the UNet's, with fp8_base the text encoders' too."""
    if keeps_float8(options):
        store_in_float8(pipeline.unet.modules())
    if options.fp8_base:
        store_in_float8(pipeline.text_encoder.modules())
        store_in_float8(pipeline.text_encoder_2.modules())


def spare_from_sharing(model: nn.Module) -> None:
    """Float8 weights are alike in every process and have no gradient: nothing to broadcast."""
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


def set_mode(optimizer: Any, mode: str) -> None:
    """Tells optimizers that keep two sets of weights (schedule-free ones) which is wanted, train
    or eval; others are left alone.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
    if callable(getattr(plain, mode, None)):
        getattr(plain, mode)()


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


def compile_unet(unet: nn.Module, backend: str) -> None:
    """torch_compile, in place. Hooks are watched, which torch leaves out by default: else an
    adapter that is put on later would not be seen.
    """
    import torch._dynamo as dynamo

    dynamo.config.skip_nnmodule_hook_guards = False
    unet.compile(backend=backend)


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
