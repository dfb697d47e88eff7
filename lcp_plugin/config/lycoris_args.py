"""LyCORIS' LoRA and LoCon as a front end asks for them, in the words of networks.lora.

On SDXL in sd-scripts LyCORIS' presets adapt these layers (lycoris/kohya.py and config.py at
f49d30d); `conv_dim` and `conv_alpha` are network_dim and network_alpha where they are not given:

    full                   Transformer2DModel, ResnetBlock2D, Down- and Upsample2D, text encoders:
                           networks.lora with conv_dim
    attn-mlp               Transformer2DModel and text encoders: networks.lora without it
    unet-only              full without text encoders
    unet-transformer-only  attn-mlp without text encoders

Its other presets adapt other layers, and some of its switches make other modules: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcp_plugin.config.convert import is_zero
from lcp_plugin.config.findings import Findings

PRESETS = {"full": True, "attn-mlp": False, "unet-only": True, "unet-transformer-only": False}
_OTHER_MODULES = (  # switches that make another module of a LoCon
    *("use_tucker", "use_cp", "use_conv_cp", "use_scalar", "dora_wd", "rs_lora", "train_norm"),
)
_OF_OTHER_ALGORITHMS = (  # without effect on a LoCon
    *("algo", "preset", "LyCORIS_preset", "decompose_both", "factor", "block_size", "constraint"),
    *("constrain", "rescaled", "full_matrix", "unbalanced_factorization", "wd_on_output", "unit"),
    *("bypass_mode", "train_t5xxl", "rank_dropout_scale", "disable_conv_cp"),
)
_CONV = ("conv_dim", "conv_alpha")
_DROPOUTS = ("rank_dropout", "network_dropout", "dropout")  # LyCORIS drops outputs, unscaled


def as_networks_lora(
    found: dict[str, Any], given: Mapping[str, Any], source: str, findings: Findings
) -> dict[str, Any]:
    """network_args of LyCORIS' LoCon as those of networks.lora; options it sets are put in `found`.

    Args:
        given: LyCORIS' own network_args; what is not there may be a field of the form.
    """
    args = {**{key: found.pop(key) for key in _fields(found)}, **given}
    preset = str(args.get("preset") or args.get("LyCORIS_preset") or "full")
    switched = [key for key in _OTHER_MODULES if _is_on(args.get(key))]
    if _is_on(args.get("rank_dropout_scale")):
        switched.append("rank_dropout_scale")
    if "disable_conv_cp" in args and not _is_on(args["disable_conv_cp"]):
        switched.append("disable_conv_cp = false")
    if switched:
        findings.problem(
            source,
            f"{', '.join(switched)}: LyCORIS' LoCon with that is not trained here; leave it out, "
            "or use sd-scripts.",
        )
    if preset not in PRESETS:
        findings.problem(
            source,
            f"preset = {preset!r} of LyCORIS is not trained here, only {', '.join(PRESETS)}.",
        )
    kept = {k: v for k, v in args.items() if k not in (*_OTHER_MODULES, *_OF_OTHER_ALGORITHMS)}
    conv = {"conv_dim": found.get("network_dim", 4), "conv_alpha": found.get("network_alpha", 1)}
    for key in _CONV:
        value = kept.pop(key, None)
        if PRESETS.get(preset, True):
            kept[key] = conv[key] if value in (None, "") or is_zero(value) else value
    if preset.startswith("unet-"):
        found["network_train_unet_only"] = True
    told = f"{source}: LyCORIS' LoCon (preset {preset}) is trained as networks.lora"
    told += f" with conv_dim {kept['conv_dim']}" if "conv_dim" in kept else " without conv_dim"
    drops = {**found, **kept}
    dropped = [key for key in _DROPOUTS if not is_zero(drops.get(key) or 0)]
    if dropped:
        told += f", the same layers; {' and '.join(dropped)} as networks.lora has it, not LyCORIS"
    else:
        told += ", the same layers and formula"
    findings.notice(f"{told}.")
    return kept


def _fields(found: Mapping[str, Any]) -> list[str]:
    names = (*_OTHER_MODULES, *_OF_OTHER_ALGORITHMS, *_CONV)
    return [key for key in names if key in found]


def _is_on(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes")
