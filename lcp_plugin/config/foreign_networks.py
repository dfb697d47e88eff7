"""Which network a config of another tool asks for, in network_args of ours, or why it stops here.

LoRA and LoCon are trained. LyCORIS' "locon" (its "lora" is the same) is LoCon: where conv_dim and
conv_alpha are not given it takes network_dim and network_alpha for them, kohya's takes none. On
SDXL in sd-scripts its presets adapt these layers (lycoris/kohya.py and config.py at f49d30d):

    full                   Transformer2DModel, ResnetBlock2D, Down- and Upsample2D, text encoders:
                           networks.lora with conv_dim
    attn-mlp               Transformer2DModel and text encoders: networks.lora without it
    unet-only              full without text encoders
    unet-transformer-only  attn-mlp without text encoders

(the fields of a form: bmaltais/kohya_ss, kohya_gui/lora_gui.py)
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lcp_plugin.config.convert import is_zero
from lcp_plugin.config.findings import Findings
from lcp_plugin.config.network_args import NETWORK_ARGS
from lcp_plugin.config.options import option_fields

_OURS = ("", *option_fields()["network_module"].metadata["choices"])
_LYCORIS = "lycoris.kohya"
_PLAIN = ("standard", "lora")
_LYCORIS_LOCON = ("locon", "lycoris/locon")
_WITH_CONV = ("kohya locon", *_LYCORIS_LOCON)
_CONV = ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas")
_OF_LYCORIS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout")
_PRESETS = {"full": True, "attn-mlp": False, "unet-only": True, "unet-transformer-only": False}
_DECISIVE = {  # of LyCORIS' arguments: what they train that is not trained here
    "dora_wd": "a DoRA (its magnitudes too)",
    "train_norm": "norm layers too",
    "rs_lora": "at alpha / sqrt(rank)",
}
_DROPOUTS = ("rank_dropout", "network_dropout", "dropout")  # LyCORIS drops outputs, unscaled
_SHADES = ("use_tucker", "use_cp", "use_conv_cp", "use_scalar", "bypass_mode", "rank_dropout_scale")


def is_foreign(found: Mapping[str, Any]) -> bool:
    """Whether a flat config names a network_module that is none of ours."""
    return str(found.get("network_module") or "") not in _OURS


def translate_network(
    found: Mapping[str, Any], source: str, accepted: bool, findings: Findings
) -> dict[str, Any]:
    """A flat config with networks.lora and its arguments in place of what it names.

    `accepted`: the command line asks for a LoRA whatever the file says.
    """
    rest = dict(found)
    given = _arguments(rest.pop("network_args", None), source, findings)
    module = str(rest.get("network_module") or "")
    key, kind = _kind(rest, given, module)
    if kind.lower() not in (*_PLAIN, *_WITH_CONV) and not accepted:
        findings.problem(
            source,
            f"{key} = {kind!r} is not trained here, only LoRA (Standard) and LoCon; say "
            "--network_module networks.lora to train a LoRA with the other settings.",
        )
    is_form = "LoRA_type" in rest
    settings = {**rest, **given} if is_form else given
    preset = _preset_of(settings)
    if kind.lower() in _LYCORIS_LOCON:
        if not accepted:
            _stop_at_more_than_locon(settings, source, findings)
        _tell_what_differs({**rest, **given}, preset, source, findings)
    rest.pop("LoRA_type", None)
    if dropout := given.pop("dropout", None):
        rest.setdefault("network_dropout", dropout)
    fields = {name: rest.pop(name, None) for name in NETWORK_ARGS}
    arguments = {**_used_fields(fields, kind.lower()), **given}
    if kind.lower() in _LYCORIS_LOCON:
        _settle_preset(rest, arguments, preset)
    if module not in _OURS or kind.lower() not in _PLAIN:
        arguments = {k: v for k, v in arguments.items() if k in NETWORK_ARGS}
    rest["network_module"] = module if module in _OURS and module else "networks.lora"
    return {**rest, "network_args": [f"{k}={_joined(v)}" for k, v in arguments.items()]}


def _arguments(value: Any, source: str, findings: Findings) -> dict[str, Any]:
    """network_args by name: from a table, a list of key=value or one text of them."""
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if v not in ("", None)}
    try:
        words = shlex.split(value) if isinstance(value, str) else [str(v) for v in value or ()]
    except (TypeError, ValueError) as error:
        findings.problem(source, f"network_args = {value!r}: {error}.")
        return {}
    return dict(word.partition("=")[::2] for word in words)


def _kind(found: Mapping[str, Any], given: Mapping[str, Any], module: str) -> tuple[str, str]:
    """(what says so, the network's kind)."""
    if found.get("LoRA_type"):
        return "LoRA_type", str(found["LoRA_type"])
    if found.get("fa") is True:
        return "fa", "LoRA-FA"
    if module == _LYCORIS or given.get("algo"):
        algorithm = str(given.get("algo") or "lora").strip("\"'")
        return "algo", "locon" if algorithm.lower() in ("lora", "locon") else algorithm
    if module not in _OURS:
        return "network_module", module
    return ("unit", "DyLoRA") if "unit" in given else ("network_module", "lora")


def _stop_at_more_than_locon(settings: Mapping[str, Any], source: str, findings: Findings) -> None:
    """Problems for what LyCORIS' LoCon can train beside LoCon."""
    accept = "say --network_module networks.lora to train a LoCon without that."
    for name, what in _DECISIVE.items():
        if _is_on(settings.get(name)):
            findings.problem(
                source, f"{name} = true trains {what}, which is not done here; {accept}"
            )
    if (preset := _preset_of(settings)) not in _PRESETS:
        findings.problem(
            source,
            f"preset = {preset!r} adapts other layers than kohya's LoCon does; {accept}",
        )


def _preset_of(settings: Mapping[str, Any]) -> str:
    given = next((settings[k] for k in ("LyCORIS_preset", "preset") if settings.get(k)), "full")
    return str(given).strip("\"' ").lower()


def _settle_preset(rest: dict[str, Any], arguments: dict[str, Any], preset: str) -> None:
    """Ranks of convolutions as LyCORIS fills them in, or none; text encoders left out or not."""
    if not _PRESETS.get(preset, True):
        for name in _CONV:
            arguments.pop(name, None)
    else:
        arguments.setdefault("conv_dim", rest.get("network_dim", 4))
        arguments.setdefault("conv_alpha", rest.get("network_alpha", 1))
    if preset.startswith("unet-"):
        rest["network_train_unet_only"] = True


def _tell_what_differs(
    settings: Mapping[str, Any], preset: str, source: str, findings: Findings
) -> None:
    """One notice of what LyCORIS' LoCon does otherwise, without weight for the result."""
    shades = [name for name in _SHADES if _is_on(settings.get(name))]
    told = f"; {', '.join(shades)} of it is not used" if shades else ""
    dropped = [name for name in _DROPOUTS if not is_zero(settings.get(name) or 0)]
    told += f"; {' and '.join(dropped)} as networks.lora has it" if dropped else ""
    findings.notice(
        f"{source}: LyCORIS' LoCon (preset {preset}) is trained as networks.lora "
        f"{'with' if _PRESETS.get(preset, True) else 'without'} conv_dim, on the same layers{told}."
    )


def _used_fields(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What of a form's fields its front end gives to this kind of network."""
    used = {k: v for k, v in fields.items() if v not in (None, "") and not is_zero(v)}
    if kind in _LYCORIS_LOCON:
        return {k: v for k, v in used.items() if k in _OF_LYCORIS}
    return used if kind in _WITH_CONV else {k: v for k, v in used.items() if k not in _CONV[:2]}


def _is_on(value: Any) -> bool:
    return str(value).strip("\"' ").lower() in ("true", "1")


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).strip("\"'")
