"""Configurations of kohya's front ends, in the trainer's own words.

kohya_ss                     its saved .json: names and units of its form's fields, prompts as text
LoRA_Easy_Training_Scripts   TOML of [x.args] and [x.dataset_args] tables beside [[subsets]]
notebooks, by hand           the trainer's TOML, LyCORIS' networks or a front end's name in it

In all of them 0 and "" of a field mean that it was left alone. A value that decides what is trained
and that cannot be honoured is a problem; other fields that only a front end knows are one notice.
(bmaltais/kohya_ss, kohya_gui/lora_gui.py; derrian-distro/LoRA_Easy_Training_Scripts)
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from lcp_plugin.config.convert import is_zero
from lcp_plugin.config.datasets import SUBSET_KEYS
from lcp_plugin.config.findings import Findings
from lcp_plugin.config.flags import parse_flags
from lcp_plugin.config.foreign_networks import is_foreign, translate_network
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.sources import flatten
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import agree, join_names

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
    *("huber_c", "huber_scale", "network_dim", "clip_skip", "min_timestep"),
)
_OTHER_MODELS = {  # where it is set, another model is trained
    *("flux1_checkbox", "sd3_checkbox", "v2", "anima_checkbox", "lumina_checkbox"),
    *("hunyuan_image_checkbox", "flux_args"),
}
_SIDE = 8  # pixels of a latent's pixel; forms made for SD 1.5 have bucket_reso_steps = 1
_OTHER_TABS = {  # a field of kohya_ss' form -> what the form trains, where it is no LoRA
    "init_word": "a textual inversion",
    "token_string": "a textual inversion",
    "image_folder": "the whole model",
    "max_resolution": "the whole model",
}
_SAMPLES = ("sample_every_n_steps", "sample_every_n_epochs")
_PROMPT_FILE = re.compile(r"[^\n]+\.(txt|toml|json)", re.IGNORECASE)
_OF_A_LORA = {"LoRA_type", "network_dim", "network_alpha", "network_module"}
_EASY_ARGS = ("args", "dataset_args")
_EASY_OPTIMIZERS = {  # names of LoRA_Easy_Training_Scripts that stand for classes of its own
    "came": "LoraEasyCustomOptimizer.came.CAME",
    "compass": "LoraEasyCustomOptimizer.compass.Compass",
    "lpfadamw": "LoraEasyCustomOptimizer.lpfadamw.LPFAdamW",
    "rmsprop": "LoraEasyCustomOptimizer.rmsprop.RMSProp",
}


def translate_foreign(
    table: Mapping[str, Any], source: str, flags: Mapping[str, Any], findings: Findings
) -> dict[str, Any]:
    """A config's table in the trainer's own names; what it already says so stays.

    `flags`: options of the command line, which beat what the file says.
    """
    easy = any(_is_easy_section(value) for value in table.values())
    found = _dissolve_easy(table) if easy else dict(table)
    gui = bool(_GUI_SIGNS & set(flatten(found)))
    accepted = bool(flags.get("network_module"))  # another network than the file's is asked for
    if easy or gui:
        flat = found if easy else flatten(found)
        if gui and flat.get("lr_scheduler_num_cycles") == "" and "epoch" in flat:
            flat["lr_scheduler_num_cycles"] = flat["epoch"]  # kohya_ss: a restart an epoch
        found = {k: v for k, v in flat.items() if v not in ("", None, [], "None")}
        _stop_at_other_models(found, source, findings)
        if not accepted:
            _stop_at_other_tabs(found, source, findings)
        found = translate_network(found, source, accepted, findings)
        found = _from_form(found, source, findings)
        found |= _additional(found.pop("additional_parameters", ""), source, findings)
    elif is_foreign(flatten(found)):
        found = translate_network(_flat_with_arguments(found), source, accepted, findings)
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


def _flat_with_arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table flattened, its [network_args] kept together, whatever options have their names."""
    arguments = table.get("network_args")
    rest = {k: v for k, v in table.items() if k != "network_args"}
    return {**flatten(rest), **({} if arguments is None else {"network_args": arguments})}


def _is_easy_section(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(value.get(k), Mapping) for k in _EASY_ARGS)


def _dissolve_easy(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of LoRA_Easy_Training_Scripts as one, its subsets as a data set."""
    flat: dict[str, Any] = {"sdxl": False}  # a missing one means so
    for key, value in table.items():
        if key == "flux_args" and isinstance(value, Mapping) and value.get("args"):
            flat[key] = value["args"]
        elif _is_easy_section(value):
            flat.update({k: v for k, v in value.items() if k not in _EASY_ARGS})
            for part in _EASY_ARGS:
                flat.update(value.get(part, {}))
        elif key != "subsets":
            flat.update(value if isinstance(value, Mapping) else {key: value})
    if (short := str(flat.get("optimizer_type", "")).lower()) in _EASY_OPTIMIZERS:
        flat["optimizer_type"] = _EASY_OPTIMIZERS[short]
    subsets = [_known_of_subset(s) for s in table.get("subsets", []) if isinstance(s, Mapping)]
    return {**flat, "datasets": [{"subsets": subsets}]} if subsets else flat


def _known_of_subset(subset: Mapping[str, Any]) -> dict[str, Any]:
    """A subset without its fields that were left alone, and without its name."""
    return {k: v for k, v in subset.items() if k != "name" and (k in SUBSET_KEYS or v)}


def _stop_at_other_models(found: dict[str, Any], source: str, findings: Findings) -> None:
    """Problems for models that cannot be trained here."""
    for key in sorted(_OTHER_MODELS & set(found)):
        if found[key] is True or isinstance(found[key], Mapping):
            value = "true" if found[key] is True else "(its settings)"
            findings.problem(source, f"{key} = {value}: this trains SDXL only.")
    if found.pop("sdxl", True) is False:
        findings.notice(
            f"{source}: sdxl = false: its settings were made for SD 1.5, and SDXL is trained."
        )


def _stop_at_other_tabs(found: Mapping[str, Any], source: str, findings: Findings) -> None:
    """Problems for forms that train no LoRA."""
    trained = (
        ""
        if _OF_A_LORA & set(found)
        else next((what for key, what in _OTHER_TABS.items() if key in found), "")
    )
    if not trained and str(found.get("train_mode", "")).lower() == "ti":
        trained = "a textual inversion"
    if trained:
        findings.problem(
            source,
            f"this form trains {trained}, and only LoRA is trained here; say --network_module "
            "networks.lora to train a LoRA with its other settings.",
        )


def _from_form(found: dict[str, Any], source: str, findings: Findings) -> dict[str, Any]:
    """A form's values with the meaning that its front end gives them."""
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
    _settle_prompts(found, source, findings)
    if 0 < _number(found.get("bucket_reso_steps")) < _SIDE:
        found["bucket_reso_steps"] = _SIDE
        findings.notice(f"{source}: bucket_reso_steps is read as 8, the side of a latent's pixel.")
    if found.pop("use_wandb", False) is True:
        found.setdefault("log_with", "wandb")
    return {k: v for k, v in found.items() if not (k in _ZERO_UNSET and is_zero(v))}


def _number(value: Any) -> float:
    """A form's number, however it is written; 0 for none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _settle_prompts(found: dict[str, Any], source: str, findings: Findings) -> None:
    """A form holds its prompts as text, or names their file; without any it draws no samples."""
    prompts = str(found.get("sample_prompts", "")).strip()
    if prompts and not (os.path.isfile(prompts) or _PROMPT_FILE.fullmatch(prompts)):
        found["sample_prompts"] = f"{prompts}\n"
    every = [key for key in _SAMPLES if not is_zero(found.get(key) or 0)]
    if every and not prompts:
        for key in every:
            del found[key]
        used = agree(len(every), "is", "are")
        findings.notice(f"{source}: {join_names(every)} {used} not used: there are no prompts.")


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
    read: list[str] = []
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
            read += [f"{old} = {value} is read as {new}"] if value is not False else []
    if read:
        findings.notice(f"{source}: {'; '.join(read)}.")


def _without_strangers(found: Mapping[str, Any], source: str, findings: Findings) -> dict[str, Any]:
    """The options and tables that are known here; the rest in one notice."""
    known = {k: v for k, v in found.items() if k in option_fields() or k in ("datasets", "tasks")}
    rest = sorted(k for k, v in found.items() if k not in known and v and not is_zero(v))
    if rest:
        findings.notice(f"{source}: fields of the front end, not used: {', '.join(rest)}.")
    return known
