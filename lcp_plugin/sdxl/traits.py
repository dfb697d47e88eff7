"""What a base says of itself, read from its files without its weights.

diffusers folder    unet/config.json, vae/config.json, scheduler/scheduler_config.json
single file         keys without meaning but their presence: `v_pred` (v-prediction) and `ztsnr`
                    (v-prediction whose last step is pure noise, arXiv 2305.08891)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.check import FROM_PURE_NOISE, cannot_start
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.prompts import read_prompts
from lcp_plugin.errors import BaseModelError, ConfigError
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.load import V_KEY, ZERO_SNR_KEY, find_base

SDXL_SIDE = 1024  # pixels
_SAYS_SO = "the base's own files say that its last timestep is pure noise"


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


def settle_zero_terminal(config: RunConfig) -> RunConfig:
    """The config with zero_terminal_snr on where the base says so and the user says nothing.

    Raises ConfigError for a sampler that cannot start from pure noise.
    """
    options = config.options
    if (
        options.zero_terminal_snr
        or not read_traits(options.pretrained_model_name_or_path).zero_terminal_snr
    ):
        return config
    if "zero_terminal_snr" in config.provenance:
        text = f"{_SAYS_SO}, but zero_terminal_snr = false is given and holds."
        return replace(config, notices=(*config.notices, text))
    if options.sample_prompts and options.sample_sampler not in FROM_PURE_NOISE:
        raise ConfigError(
            f"sample_sampler = {options.sample_sampler!r} cannot start from pure noise, and "
            f"{_SAYS_SO}; use one of {', '.join(FROM_PURE_NOISE)}."
        )
    if options.sample_prompts:
        prompts = read_prompts(Path(options.sample_prompts))
        if unfit := {p.sample_sampler for p in prompts if p.sample_sampler} - set(FROM_PURE_NOISE):
            raise ConfigError(f"sample_prompts {cannot_start(unfit)}")

    tasks = (replace(t, options=replace(t.options, zero_terminal_snr=True)) for t in config.tasks)
    return replace(
        config,
        options=replace(options, zero_terminal_snr=True),
        tasks=tuple(tasks),
        provenance={**config.provenance, "zero_terminal_snr": "the base's own files"},
        notices=(*config.notices, f"{_SAYS_SO}: zero_terminal_snr is on."),
    )


def _read_config(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
