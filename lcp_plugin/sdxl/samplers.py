"""Samplers by kohya's names (`sample_sampler`, `--ss`), as diffusers' schedulers.

Every sampler keeps the base's noise schedule and prediction type; with a zero-terminal-SNR base the
betas stay rescaled (kohya forgets that).
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

from lcp_plugin.config.samplers import FROM_PURE_NOISE, SAMPLERS
from lcp_plugin.errors import ConfigError

# name -> diffusers class, arguments beside the base's own
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
}
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "steps_offset",
)


def create_sampler(
    name: str,
    base: Any,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
) -> Any:
    """A diffusers scheduler named as kohya names it, over the base pipeline's scheduler `base`.

    Raises ConfigError for an unknown name, for lms without scipy, and for a sampler that cannot
    start from pure noise where zero_terminal_snr asks for it.
    """
    import diffusers

    plain = name[2:] if name.startswith("k_") else name
    if name not in SAMPLERS:
        raise ConfigError(f"sample_sampler = {name!r}: wanted one of {', '.join(SAMPLERS)}.")
    class_name, extra = _SAMPLERS[plain]
    kind = getattr(diffusers, class_name)
    accepted = inspect.signature(kind.__init__).parameters
    config = {key: base.config[key] for key in _SCHEDULE if key in base.config and key in accepted}
    config |= {key: value for key, value in extra.items() if key in accepted}
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    if zero_terminal_snr:
        config |= _zero_terminal(plain, accepted)
    try:
        return kind(**config)
    except ImportError:
        raise ConfigError(
            f"sample_sampler = {name!r} needs the package scipy; pip install scipy, or use euler."
        ) from None


def _zero_terminal(name: str, accepted: Container[str]) -> dict[str, Any]:
    """What sampling from a zero-terminal-SNR model needs (arXiv 2305.08891)."""
    if name not in FROM_PURE_NOISE or "rescale_betas_zero_snr" not in accepted:
        raise ConfigError(
            f"sample_sampler = {name!r} cannot start from pure noise, as zero_terminal_snr needs; "
            f"use {', '.join(FROM_PURE_NOISE)}."
        )
    return {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
