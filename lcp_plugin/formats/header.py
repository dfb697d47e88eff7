"""Header entries that others read: kohya's `ss_*`, Stability's `modelspec.*`; they are worded here
alone, and ours (`ss_lcp_*`) in `lineage`.

All of it is text. `ss_*` are those of kohya-ss/sd-scripts (train_network.py at 48d368fa): Python's
str() of options and counts, JSON of tables, times in seconds since 1970. What is not known is left
out where sd-scripts leaves it out, and "None" where sd-scripts says None. `modelspec.*` are those
of Stability's model spec 1.0.1.
"""

from __future__ import annotations

import calendar
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from lcp_plugin.adapter import Factors
from lcp_plugin.tasks import TaskRecord

OPTION_KEYS = (  # repeat an option, of another name where _OTHER_OPTION has it
    *("output_name", "learning_rate", "text_encoder_lr", "unet_lr", "gradient_checkpointing"),
    *("gradient_accumulation_steps", "max_train_steps", "lr_warmup_steps", "lr_scheduler"),
    *("network_module", "network_dim", "network_alpha", "network_dropout", "network_args"),
    *("mixed_precision", "full_fp16", "v2", "base_model_version", "clip_skip"),
    *("max_token_length", "cache_latents", "seed", "lowram", "noise_offset"),
    *("noise_offset_random_strength", "multires_noise_iterations", "multires_noise_discount"),
    *("adaptive_noise_scale", "zero_terminal_snr", "training_comment", "sd_scripts_commit_hash"),
    *("optimizer", "max_grad_norm", "caption_dropout_rate", "caption_dropout_every_n_epochs"),
    *("caption_tag_dropout_rate", "face_crop_aug_range", "prior_loss_weight", "min_snr_gamma"),
    *("scale_weight_norms", "ip_noise_gamma", "ip_noise_gamma_random_strength"),
    *("debiased_estimation", "loss_type", "huber_schedule", "huber_scale", "huber_c", "fp8_base"),
    *("fp8_base_unet", "validation_seed", "validation_split", "max_validation_steps"),
    *("validate_every_n_epochs", "validate_every_n_steps", "resize_interpolation"),
)
FACT_KEYS = (  # counted or measured; left out where they are not known
    *("session_id", "training_started_at", "training_finished_at", "num_train_images"),
    *("num_validation_images", "num_reg_images", "num_batches_per_epoch", "num_epochs", "epoch"),
    *("steps", "sd_model_name", "sd_model_hash", "new_sd_model_hash", "vae_name", "vae_hash"),
    *("new_vae_hash", "tag_frequency", "dataset_dirs"),
)
FOLDER_KEYS = (  # of data given as folders or in_json: one data set with the options' settings
    *("batch_size_per_device", "total_batch_size", "resolution", "color_aug", "flip_aug"),
    *("random_crop", "shuffle_caption", "enable_bucket", "bucket_no_upscale", "min_bucket_reso"),
    *("max_bucket_reso", "keep_tokens", "reg_dataset_dirs", "bucket_info"),
)
TABLE_KEYS = ("datasets",)  # of data described in tables of their own
BASE_KEYS = ("sd_model_name", "sd_model_hash", "new_sd_model_hash")
MINIMUM_KEYS = ("v2", "base_model_version", "network_module")  # of what no trainer wrote
TAGS = "tag_frequency"
MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
HASHES = (MODEL_HASH, LEGACY_HASH)  # of the tensors; whoever writes a file makes them
MODELSPEC = "modelspec."
TRIGGERS = f"{MODELSPEC}trigger_phrase"
PREDICTS = f"{MODELSPEC}prediction_type"
INDISPENSABLE = (  # readers need these to tell what the file is (sd-scripts, library/train_util.py)
    *("v2", "base_model_version", "network_module", "network_dim", "network_alpha"),
    "network_args",
)
_TABLES = (
    *("network_args", "datasets", "dataset_dirs", "reg_dataset_dirs", "tag_frequency"),
    "bucket_info",
)
_OTHER_OPTION = {"debiased_estimation": "debiased_estimation_loss", "optimizer": "optimizer_type"}
_FIXED = {
    "network_module": "networks.lora",  # the format of the file, whoever wrote it
    "base_model_version": "sdxl_base_v1-0",
    "v2": False,
    "sd_scripts_commit_hash": "(none)",
}


def kohya_header(
    options: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The `ss_*` entries that sd-scripts writes of a training, as text.

    Args:
        options: kohya's options by name (network_dim, learning_rate, ...).
        facts: what no option says, by key without `ss_`: session_id, steps, num_train_images,
            tag_frequency (a dict), ...; they win over options.
    """
    known = {**_FIXED, **(facts or {})}
    values = {
        key: known.get(key, _as_kohya(key, options.get(_OTHER_OPTION.get(key, key))))
        for key in OPTION_KEYS
    }
    values |= {k: known[k] for k in (*FACT_KEYS, *TABLE_KEYS) if known.get(k) is not None}
    values |= {k: known[k] for k in FOLDER_KEYS if k in known}
    return {f"ss_{key}": _text(key, value) for key, value in values.items()}


def minimal_header(output_name: str, tasks: Iterable[TaskRecord]) -> dict[str, str]:
    """The `ss_*` entries of a file that no trainer wrote: what it is, and its words."""
    known = {key: _FIXED[key] for key in MINIMUM_KEYS}
    known |= {"output_name": output_name, TAGS: tag_frequency(tasks)}
    return {f"ss_{key}": _text(key, value) for key, value in known.items()}


def tags_header(own: Mapping[str, Any], tasks: Iterable[TaskRecord]) -> dict[str, str]:
    """ss_tag_frequency of what a training counted itself, and of tasks before it."""
    return {f"ss_{TAGS}": _text(TAGS, {**tag_frequency(tasks), **own})}


def _as_kohya(key: str, value: Any) -> Any:
    """An option as sd-scripts holds it."""
    if key == "text_encoder_lr" and isinstance(value, list | tuple):
        return list(value) if len(value) > 1 else next(iter(value), None)
    if key == "network_args":
        pairs = value.items() if isinstance(value, Mapping) else map(_split_pair, value or ())
        return dict(pairs)
    if key == "lr_warmup_steps" and isinstance(value, float) and value >= 1:
        return int(value)  # a count; below 1 it is a share of the steps
    if key == "zero_terminal_snr":
        return bool(value)
    return value


def _split_pair(text: str) -> tuple[str, str]:
    name, _, value = str(text).partition("=")
    return name.strip(), value.strip()


def _text(key: str, value: Any) -> str:
    if key in _TABLES and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def epoch_seconds(stamp: object) -> float | None:
    """Seconds since 1970 of a UTC time in ISO 8601, or of what is a number already; else None."""
    text = str(stamp)
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def size_header(adapter: Mapping[str, Factors]) -> dict[str, str]:
    """Rank and alpha of the file, not of the options (ranks of several tasks add up): those of most
    modules, or "Dynamic", kohya's word, where no two values hold for more than half of them.
    """
    counts = Counter((factors.rank, factors.alpha) for factors in adapter.values())
    if not counts:
        return {}
    (rank, alpha), count = counts.most_common(1)[0]
    told = (str(rank), str(alpha)) if 2 * count > len(adapter) else ("Dynamic", "Dynamic")
    return {"ss_network_dim": told[0], "ss_network_alpha": told[1]}


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag stands in a folder's captions, as kohya counts: split at commas, in lower
    case, every image once.
    """
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def tag_frequency(tasks: Iterable[TaskRecord]) -> dict[str, dict[str, int]]:
    """kohya's ss_tag_frequency of tasks whose captions are not at hand: their concepts. Front ends
    show its words as trigger words.
    """
    table: dict[str, dict[str, int]] = {}
    for task in tasks:
        count = task.facts.get("images", 1)
        folder = f"{task.index}_{task.concept}"
        table[folder] = {task.concept: int(count) if isinstance(count, int | float) else 1}
    return table


def modelspec_header(
    title: str,
    resolution: int | str = "1024x1024",
    prediction_type: str = "epsilon",
    date: datetime | None = None,
    triggers: Sequence[str] = (),
    merged_from: Sequence[str] = (),
    version: str = "",
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Stability's model spec 1.0.1 for an SDXL LoRA.

    Args:
        resolution: pixels per side, or "WxH".
        prediction_type: epsilon or v_prediction; the spec says "v".
        date: local time without zone, as kohya writes it; None is now.
        version: of lcp_plugin.
        extra: author, description, license, tags, ... without `modelspec.`.
    """
    when = (date or datetime.now()).replace(microsecond=0, tzinfo=None)
    size = resolution if isinstance(resolution, str) else f"{resolution}x{resolution}"
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "date": when.isoformat(),
        "resolution": size,
        "prediction_type": "v" if prediction_type.startswith("v") else "epsilon",
        "implementation_version": f"lcp_plugin/{version}" if version else "",
        "trigger_phrase": ", ".join(triggers),
        "merged_from": ", ".join(merged_from),
        **(extra or {}),
    }
    return {f"{MODELSPEC}{key}": value for key, value in values.items() if value}


# ------------------------------------------------------------------- parts of a header, by meaning


def strip_metadata(header: Mapping[str, str]) -> dict[str, str]:
    """--no_metadata: the indispensable keys and `modelspec.*`; prompts, folders, seeds and lineage
    are left out. A chain can still go on from such a file, as from anyone's LoRA.
    """
    kept = {*(f"ss_{key}" for key in INDISPENSABLE), *HASHES}
    return {k: text for k, text in header.items() if k in kept or k.startswith(MODELSPEC)}


def base_words(header: Mapping[str, str]) -> dict[str, str]:
    """What a header says of its base, in sd-scripts' keys."""
    keys = [f"ss_{key}" for key in BASE_KEYS]
    return {key: header[key] for key in keys if header.get(key, "None") != "None"}
