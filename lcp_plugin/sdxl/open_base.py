"""A base opened by what a run was made on, rather than by a run's options: to look at it again.

Everything is on the device, in the type asked for; base_weights are in it. Noise schedule and what
becomes of prompts (max_token_length, weighted_captions) are those that the run trained under.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lcp_plugin.sdxl.base_weights import BaseSource, add_to_base, check_source, sum_weights
from lcp_plugin.sdxl.live_base import LiveBase, adapt_pipeline, settle_schedule
from lcp_plugin.sdxl.load import load_pipeline

logger = logging.getLogger(__name__)


def open_base(
    source: BaseSource,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
) -> LiveBase:
    """The base of a run, W_0, in evaluation mode.

    Args:
        vae: a replacement VAE; None: the run's own.
    Raises:
        LineageError: it is no longer what the run was trained on.
        BaseModelError: it cannot be loaded.
    """
    check_source(source)
    logger.info("loading %s", source.name)
    pipeline = load_pipeline(source.model, dtype, vae or source.vae)
    schedule = settle_schedule(pipeline, device, source.v_prediction, source.zero_terminal_snr)
    pipeline.to(device)
    adapted = adapt_pipeline(pipeline)
    parts = [(Path(path), weight) for path, weight, _ in source.added]
    add_to_base(adapted.layers, sum_weights(parts), fuse=dtype is torch.float32)
    adapted.eval()
    return LiveBase(
        pipeline, adapted, schedule, device, dtype, home=str(device), texts=source.texts
    )
