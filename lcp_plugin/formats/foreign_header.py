"""What any LoRA's header says, whoever wrote it: lcp_plugin, kohya, OneTrainer or ai-toolkit.

Nothing in a header is followed or run, and what cannot be understood is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcp_plugin.errors import LineageError
from lcp_plugin.formats.header import FOLDER_KEYS, OPTION_KEYS
from lcp_plugin.formats.lineage import Lineage, is_ours, known_hash
from lcp_plugin.telling.wording import agree

_NO_OPTION = (  # keys that repeat no option of this name, or one that a file to train again sets
    *("output_name", "network_args", "v2", "base_model_version", "clip_skip", "cache_latents"),
    *("lowram", "sd_scripts_commit_hash", "optimizer", "face_crop_aug_range"),
    *("debiased_estimation", "max_validation_steps", "validate_every_n_epochs"),
    *("validate_every_n_steps", "batch_size_per_device", "total_batch_size", "resolution"),
    *("reg_dataset_dirs", "bucket_info"),
)


@dataclass(frozen=True)
class Claims:
    """What a LoRA's header says of its making, whoever wrote it. Empty: not said."""

    tool: str = ""  # lcp_plugin, kohya sd-scripts, OneTrainer, ai-toolkit, diffusers, ...
    title: str = ""
    base: str = ""
    date: str = ""
    triggers: tuple[str, ...] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)  # folder -> "12 images x 10"
    options: Mapping[str, Any] = field(default_factory=dict)  # in kohya's words


def read_claims(metadata: Mapping[str, str]) -> Claims:
    """What a header says, of lcp_plugin, kohya, OneTrainer or ai-toolkit; never fails."""
    lineage = None
    try:
        lineage = Lineage.from_metadata(metadata)
    except LineageError:
        pass  # damaged: the rest of the header may still say something
    options = {**_kohya_options(metadata), **_onetrainer_options(metadata)}
    if lineage is not None:
        options.update(lineage.options)
    datasets, words = _kohya_datasets(metadata)
    triggers = lineage.triggers if lineage else ()
    if not triggers:
        phrase = metadata.get("modelspec.trigger_phrase", "")
        triggers = tuple(part.strip() for part in phrase.split(",") if part.strip()) or words
    return Claims(
        tool=_tool_of(metadata),
        title=metadata.get("modelspec.title") or _said(metadata, "ss_output_name", "name"),
        base=(lineage.base if lineage else "")
        or str(options.get("pretrained_model_name_or_path") or "")
        or _said(metadata, "ss_base_model_version", "modelspec.architecture"),
        date=metadata.get("modelspec.date", ""),
        triggers=triggers,
        datasets=datasets,
        options=options,
    )


def _said(metadata: Mapping[str, str], *keys: str) -> str:
    return next((metadata[k] for k in keys if metadata.get(k, "None") not in ("None", "")), "")


def named_base(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Name and hash of the base in sd-scripts' keys; "" for what is not said."""
    name = _said(metadata, "ss_sd_model_name")
    return name, known_hash(metadata.get("ss_new_sd_model_hash", ""))


def _tool_of(metadata: Mapping[str, str]) -> str:
    if is_ours(metadata):
        return "lcp_plugin"
    if "ot_revision" in metadata or "ot_config" in metadata:
        return "OneTrainer"
    software = _json(metadata.get("software"))
    if isinstance(software, dict) and software.get("name"):
        return str(software["name"])
    if "ss_network_module" in metadata or "ss_sd_scripts_commit_hash" in metadata:
        return "kohya sd-scripts"
    return "diffusers" if "lora_adapter_metadata" in metadata else ""


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _kohya_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """kohya's options, by the names that a config gives them."""
    names = [key for key in (*OPTION_KEYS, *FOLDER_KEYS) if key not in _NO_OPTION]
    options = {name: _value(metadata.get(f"ss_{name}")) for name in names}
    options["train_batch_size"] = _value(metadata.get("ss_batch_size_per_device"))
    options["pretrained_model_name_or_path"] = _value(metadata.get("ss_sd_model_name"))
    options["debiased_estimation_loss"] = _value(metadata.get("ss_debiased_estimation"))
    name, _, arguments = metadata.get("ss_optimizer", "None").partition("(")
    options["optimizer_type"] = _value(name)
    options["optimizer_args"] = _split_arguments(arguments.removesuffix(")")) or None
    side = metadata.get("ss_resolution", "").strip("()").replace(" ", "")
    options["resolution"] = None if side == "None" else side or None
    given = _json(metadata.get("ss_network_args"))
    pairs = _texts_of(given) if isinstance(given, dict) else given  # a list: our early files
    options["network_args"] = pairs or None
    return {name: value for name, value in options.items() if value is not None}


def _texts_of(arguments: Mapping[str, Any]) -> list[str]:
    """network_args as a config holds them. sd-scripts adds its network_dropout under the name
    `dropout`, None included.
    """
    return [f"{k}={v}" for k, v in arguments.items() if v is not None and k != "dropout"]


def _split_arguments(text: str) -> list[str]:
    """`weight_decay=0.1,betas=(0.9, 0.99)` at the commas that are in no bracket."""
    parts = re.findall(r"(?:[^,(\[]|\([^)]*\)|\[[^\]]*\])+", text)
    return [part.strip() for part in parts if "=" in part]


def _as_dict(text: str | None) -> dict[str, Any]:
    value = _json(text)
    return value if isinstance(value, dict) else {}


def _value(text: str | None) -> Any:
    """kohya's str() of a value, undone: None, a boolean, a number, a list of them, or the text."""
    if text in (None, "None", "", "()", "[]"):
        return None
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text[0] in "([" and text[-1] in ")]":
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    return text


def _kohya_datasets(metadata: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Folders with their counts, and the most frequent tag of each."""
    folders = {
        str(name): _say_images(facts)
        for name, facts in _as_dict(metadata.get("ss_dataset_dirs")).items()
        if isinstance(facts, dict)
    }
    words = []
    for tags in _as_dict(metadata.get("ss_tag_frequency")).values():
        counts = (
            {t: c for t, c in tags.items() if isinstance(c, int)} if isinstance(tags, dict) else {}
        )
        if counts:
            words.append(str(max(counts, key=lambda t: counts[t])).strip())
    return folders, tuple(dict.fromkeys(words))


def _say_images(facts: Mapping[str, Any]) -> str:
    """`10 images x 4`."""
    number = facts.get("img_count", "?")
    return f"{number} {agree(number, 'image')} x {facts.get('n_repeats', 1)}"


def _onetrainer_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    config = _as_dict(metadata.get("ot_config"))
    optimizer = config.get("optimizer")
    found = {
        "learning_rate": config.get("learning_rate"),
        "network_dim": config.get("lora_rank"),
        "network_alpha": config.get("lora_alpha"),
        "train_batch_size": config.get("batch_size"),
        "max_train_epochs": config.get("epochs"),
        "pretrained_model_name_or_path": config.get("base_model_name"),
        "resolution": config.get("resolution"),
        "optimizer_type": optimizer.get("optimizer") if isinstance(optimizer, dict) else None,
    }
    return {name: value for name, value in found.items() if value is not None}
