"""What a base says of itself, read from its files without its weights.

diffusers folder    unet/config.json, vae/config.json, scheduler/scheduler_config.json
single file         keys without meaning but their presence: `v_pred` (v-prediction) and `ztsnr`
                    (v-prediction whose last step is pure noise, arXiv 2305.08891)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.errors import BaseModelError
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.load import V_KEY, ZERO_SNR_KEY, find_base

SDXL_SIDE = 1024  # pixels


@dataclass(frozen=True)
class Traits:
    """How a base was trained."""

    prediction_type: str = "epsilon"  # or v_prediction
    zero_terminal_snr: bool = False
    native_side: int = SDXL_SIDE  # pixels


def read_traits(name: str | None) -> Traits:
    """The traits of `pretrained_model_name_or_path`. Raises BaseModelError as `find_base` does."""
    path = find_base(name)
    if path.is_file():
        return traits_of_keys(read_header(path).tensors)
    try:
        unet, vae, noise = (
            _read_config(path / part)
            for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        )
        scale = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
        return Traits(
            prediction_type=str(noise.get("prediction_type", "epsilon")),
            zero_terminal_snr=bool(noise.get("rescale_betas_zero_snr", False)),
            native_side=int(unet.get("sample_size") or SDXL_SIDE // scale) * scale,
        )
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"base model '{name}' is damaged: {error}") from error


def traits_of_keys(keys: Any) -> Traits:
    """The traits of a single file with these tensor names."""
    zero = ZERO_SNR_KEY in keys
    return Traits("v_prediction" if zero or V_KEY in keys else "epsilon", zero)


def is_at_hand(name: str | None) -> bool:
    """Whether nothing would have to be fetched: all but the form of a hub id."""
    return not name or name.count("/") != 1 or Path(name).expanduser().exists()


def _read_config(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
