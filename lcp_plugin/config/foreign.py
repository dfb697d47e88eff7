"""Configurations of kohya's front ends, in the trainer's own words.

kohya_ss                     its saved .json: names and units of its form's fields
LoRA_Easy_Training_Scripts   TOML of [x.args] and [x.dataset_args] tables beside [[subsets]]
notebooks, by hand           the trainer's TOML with a front end's name here and there

In all of them 0 and "" of a field mean that it was left alone. A value that decides what is trained
and that cannot be honoured is a problem; other fields that only a front end knows are one notice.
(bmaltais/kohya_ss, kohya_gui/lora_gui.py; derrian-distro/LoRA_Easy_Training_Scripts)
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lcp_plugin.config.convert import is_zero
from lcp_plugin.config.datasets import SUBSET_KEYS
from lcp_plugin.config.findings import Findings
from lcp_plugin.config.flags import parse_flags
from lcp_plugin.config.lycoris_args import as_networks_lora
from lcp_plugin.config.network_args import NETWORK_ARGS
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.sources import flatten
from lcp_plugin.errors import ConfigError

_RENAMED = {  # a front end's name -> the trainer's
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "gradient_accumulation": "gradient_accumulation_steps",
    "train_unet_only": "network_train_unet_only",
    "batch_size": "train_batch_size",
    "epoch": "max_train_epochs",
}
_GUI_SIGNS = {"LoRA_type", "max_resolution", "sdxl_no_half_vae", "stop_text_encoder_training"}
_ZERO_UNSET = (  # a form's 0, where the trainer would take it for a value
    *("seed", "noise_offset", "adaptive_noise_scale", "multires_noise_iterations"),
    *("ip_noise_gamma", "v_pred_like_loss", "network_dropout", "keep_tokens", "unet_lr"),
    *("text_encoder_lr", "lr_scheduler_min_lr_ratio", "lr_decay_steps", "lr_warmup_steps"),
)
_PLAIN = ("", "standard", "lora")
_WITH_CONV = ("kohya locon", "locon", "lycoris/locon")
_CONV = ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas")
_OTHER_MODELS = ("flux1_checkbox", "sd3_checkbox", "v2")
_EASY_ARGS = ("args", "dataset_args")


def translate_foreign(
    table: Mapping[str, Any], source: str, flags: Mapping[str, Any], findings: Findings
) -> dict[str, Any]:
    """A config's table in the trainer's own names; what it already says so stays.

    `flags`: options of the command line, which beat what the file says.
    """
    easy = any(_is_easy_section(value) for value in table.values())
    found = _dissolve_easy(table) if easy else dict(table)
    gui = bool(_GUI_SIGNS & set(flatten(found)))
    if easy or gui:
        found = {k: v for k, v in flatten(found).items() if v not in ("", None, [], "None")}
        _stop_at_other_networks(found, source, flags, findings)
        if not flags.get("network_module"):
            _settle_lycoris(found, source, findings)
        found = _from_form(found)
        found |= _additional(found.pop("additional_parameters", ""), source, findings)
    _rename(found, source, findings)
    for key, value in list(found.items()):
        if isinstance(value, Mapping) and key != "prompt" and not (easy or gui):
            section = dict(value)
            _rename(section, source, findings)
            found[key] = section
    if flatten(found).get("train_inpainting") in (True, "true", "True"):
        findings.problem(
            source, "train_inpainting is not done here; leave it out, or use sd-scripts."
        )
    return _without_strangers(found, source, findings) if easy or gui else found


def _is_easy_section(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(value.get(k), Mapping) for k in _EASY_ARGS)


def _dissolve_easy(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of LoRA_Easy_Training_Scripts as one, its subsets as a data set."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if _is_easy_section(value):
            for part in _EASY_ARGS:
                flat.update(value.get(part, {}))
        elif key != "subsets":
            flat[key] = value
    subsets = [_known_of_subset(s) for s in table.get("subsets", []) if isinstance(s, Mapping)]
    return {**flat, "datasets": [{"subsets": subsets}]} if subsets else flat


def _known_of_subset(subset: Mapping[str, Any]) -> dict[str, Any]:
    """A subset without its fields that were left alone, and without its name."""
    return {k: v for k, v in subset.items() if k != "name" and (k in SUBSET_KEYS or v)}


def _stop_at_other_networks(
    found: Mapping[str, Any], source: str, flags: Mapping[str, Any], findings: Findings
) -> None:
    """Problems for networks and models that cannot be trained here."""
    args = found.get("network_args")
    algorithm = _split_args(args).get("algo", "")
    kind = str(found.get("LoRA_type") or algorithm)
    if kind.lower() not in (*_PLAIN, *_WITH_CONV) and not flags.get("network_module"):
        key = "LoRA_type" if "LoRA_type" in found else "algo"
        findings.problem(
            source,
            f"{key} = {kind!r} is not trained here, only LoRA (Standard) and LoCon; say "
            "--network_module networks.lora to train a LoRA with the other settings.",
        )
    for key in _OTHER_MODELS:
        if found.get(key) is True:
            findings.problem(source, f"{key} = true: this trains SDXL only.")


def _settle_lycoris(found: dict[str, Any], source: str, findings: Findings) -> None:
    """LyCORIS' LoCon, by module, type or `algo` (networks.lora has none), as networks.lora."""
    given, kind = _split_args(found.get("network_args")), str(found.get("LoRA_type", "")).lower()
    named = found.get("network_module") == "lycoris.kohya" or "algo" in given
    if named or kind == _WITH_CONV[-1]:
        found["network_args"] = as_networks_lora(found, given, source, findings)


def _from_form(found: dict[str, Any]) -> dict[str, Any]:
    """A form's values with the meaning that its front end gives them."""
    kind = str(found.pop("LoRA_type", "")).lower()
    found.setdefault("network_module", "networks.lora")
    if str(found["network_module"]) == "lycoris.kohya":  # what it is was looked at before
        found["network_module"] = "networks.lora"
    _collect_network_args(found, kind)
    _settle_noise(found)
    _settle_parts(found)
    if not is_zero(warmup := found.pop("lr_warmup", 0)) and is_zero(
        found.get("lr_warmup_steps", 0)
    ):
        found["lr_warmup_steps"] = f"{warmup}%"
    if "warmup_ratio" in found:
        found.setdefault("lr_warmup_steps", found.pop("warmup_ratio"))
    if isinstance(attention := found.get("xformers"), str):
        found["xformers"] = attention.lower() in ("xformers", "true")
    if found.pop("use_wandb", False) is True:
        found.setdefault("log_with", "wandb")
    return {k: v for k, v in found.items() if not (k in _ZERO_UNSET and is_zero(v))}


def _collect_network_args(found: dict[str, Any], kind: str) -> None:
    """What stands as fields of its own in a form is network_args for the trainer."""
    args = found.get("network_args")
    given = dict(args) if isinstance(args, Mapping) else {}
    given.pop("algo", None)
    given.pop("preset", None)
    for key in NETWORK_ARGS:
        value = found.pop(key, None)
        if value in (None, "") or is_zero(value) or (key in _CONV and kind not in _WITH_CONV):
            continue
        given.setdefault(key, value)
    if isinstance(args, (str, list)) and args:
        extra = shlex.split(args) if isinstance(args, str) else args
        found["network_args"] = [*(f"{k}={v}" for k, v in given.items()), *extra]
    elif given or isinstance(args, Mapping):
        found["network_args"] = [f"{k}={_joined(v)}" for k, v in given.items()]


def _split_args(args: Any) -> dict[str, Any]:
    """network_args as a table, however they are given."""
    if isinstance(args, Mapping):
        return dict(args)
    texts = shlex.split(args) if isinstance(args, str) else args or ()
    return {key: value for key, _, value in (str(text).partition("=") for text in texts)}


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _settle_noise(found: dict[str, Any]) -> None:
    """Of noise offset and pyramid noise a form uses the one that is chosen."""
    kind = found.pop("noise_offset_type", None)
    unused = {
        "Original": ("multires_noise_iterations", "multires_noise_discount"),
        "Multires": ("noise_offset", "adaptive_noise_scale"),
    }
    for key in unused.get(str(kind), ()):
        found.pop(key, None)
    if is_zero(found.get("noise_offset", 0)):
        found.pop("adaptive_noise_scale", None)


def _settle_parts(found: dict[str, Any]) -> None:
    """A rate of 0 for one part, where the other has one, leaves the part out."""
    if "unet_lr" not in found or "text_encoder_lr" not in found:
        return
    unet, text = is_zero(found["unet_lr"]), is_zero(found["text_encoder_lr"])
    if text and not unet:
        found["network_train_unet_only"] = True
    elif unet and not text:
        found["network_train_text_encoder_only"] = True


def _additional(text: Any, source: str, findings: Findings) -> dict[str, Any]:
    """A form's line of further flags."""
    try:
        return parse_flags(shlex.split(str(text), posix=False)) if text else {}
    except (ConfigError, ValueError) as error:
        for line in str(error).split("\n"):
            findings.problem(f"{source}: additional_parameters", line)
        return {}


def _rename(found: dict[str, Any], source: str, findings: Findings) -> None:
    """Front ends' names -> the trainer's, in place; the trainer's own name wins."""
    for old, new in _RENAMED.items():
        if old not in found or isinstance(found[old], Mapping):
            continue
        value = found.pop(old)
        others = ("max_train_epochs", "max_train_steps") if old == "epoch" else (new,)
        beaten = [k for k in others if found.get(k) not in (None, "") and not is_zero(found[k])]
        if value in (None, "") or is_zero(value):
            continue
        if beaten and str(found[beaten[0]]) != str(value):
            findings.notice(f"{source}: {old} = {value} is not used: {beaten[0]} is given.")
        elif not beaten:
            found[new] = value
            findings.notice(f"{source}: {old} = {value} is read as {new}.")


def _without_strangers(found: Mapping[str, Any], source: str, findings: Findings) -> dict[str, Any]:
    """The options and tables that are known here; the rest in one notice."""
    known = {k: v for k, v in found.items() if k in option_fields() or k in ("datasets", "tasks")}
    rest = sorted(k for k, v in found.items() if k not in known and v and not is_zero(v))
    if rest:
        findings.notice(f"{source}: fields of the front end, not used: {', '.join(rest)}.")
    return known
