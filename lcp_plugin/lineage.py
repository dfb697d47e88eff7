"""What a file knows of its making: tasks, strategy, base, parents by hash; and kohya's headers.

A header is text to text. `ss_lcp_*` keys are ours (other readers ignore them), `ss_*` are those of
kohya-ss/sd-scripts (train_network.py), `modelspec.*` those of Stability's model spec 1.0.1. Parents
are named by `sshs_model_hash`, which depends on tensors only, so that they can be verified even if
their metadata was edited. Everything read is data: no path in it is followed here, nothing in it is
run, and what cannot be understood is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from lcp_plugin.errors import LineageError
from lcp_plugin.tasks import TaskRecord

FORMAT = "1"


@dataclass(frozen=True)
class Source:
    """A file that another one was made from."""

    name: str
    hash: str  # sshs_model_hash, or the hash of a carry's tensors
    weight: float | None = None  # in a merge

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"name": self.name, "hash": self.hash, "weight": self.weight}


@dataclass(frozen=True)
class Lineage:
    """The `ss_lcp_*` part of a header. Empty fields were not recorded."""

    tasks: tuple[TaskRecord, ...] = ()  # oldest first, those of parents included
    strategy: str = ""  # of the last task; "merge:METHOD" or "export" for what was not trained
    strategy_args: tuple[str, ...] = ()  # key=value
    base: str = ""
    base_hash: str = ""
    carry: str = ""  # adapter: its factors go on training; delta: they rest
    carry_hash: str = ""
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # ranks stacked; * = others
    parents: tuple[Source, ...] = ()  # a chain has one at most, a merge several
    seeds: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # as a config holds them

    def to_metadata(self) -> dict[str, str]:
        """Header entries; what is empty is left out."""
        values = {
            "ss_lcp_format": FORMAT,
            "ss_lcp_tasks": _dump([t.to_json() for t in self.tasks]),
            "ss_lcp_strategy": self.strategy,
            "ss_lcp_strategy_args": _dump(list(self.strategy_args)),
            "ss_lcp_base": self.base,
            "ss_lcp_base_hash": self.base_hash,
            "ss_lcp_carry": self.carry,
            "ss_lcp_carry_hash": self.carry_hash,
            "ss_lcp_blocks": _dump({n: list(b) for n, b in self.blocks.items()}),
            "ss_lcp_parents": _dump([p.to_json() for p in self.parents]),
            "ss_lcp_seeds": _dump(dict(self.seeds)),
            "ss_lcp_versions": _dump(dict(self.versions)),
            "ss_lcp_options": _dump(dict(self.options)),
        }
        return {key: value for key, value in values.items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Lineage | None:
        """What a header says; None if it has no `ss_lcp_*` keys.

        Raises:
            LineageError: our keys are there, but damaged or of a newer version.
        """
        found = metadata.get("ss_lcp_format")
        if found is None:
            return None
        if found != FORMAT:
            raise LineageError(
                f"the lineage is of format {found[:20]}, this version reads {FORMAT}; update "
                "lcp_plugin."
            )
        try:
            return cls(
                tasks=tuple(TaskRecord.from_json(t) for t in _load(metadata, "tasks", [])),
                strategy=metadata.get("ss_lcp_strategy", ""),
                strategy_args=tuple(str(a) for a in _load(metadata, "strategy_args", [])),
                base=metadata.get("ss_lcp_base", ""),
                base_hash=metadata.get("ss_lcp_base_hash", ""),
                carry=metadata.get("ss_lcp_carry", ""),
                carry_hash=metadata.get("ss_lcp_carry_hash", ""),
                blocks={
                    str(n): tuple(int(r) for r in b)
                    for n, b in dict(_load(metadata, "blocks", {})).items()
                },
                parents=tuple(_source_from(p) for p in _load(metadata, "parents", [])),
                seeds=dict(_load(metadata, "seeds", {})),
                versions=dict(_load(metadata, "versions", {})),
                options=dict(_load(metadata, "options", {})),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LineageError(f"the lineage in the header is damaged ({error}).") from error

    @property
    def triggers(self) -> tuple[str, ...]:
        """The words that call each task, oldest first."""
        return tuple(dict.fromkeys(t.concept for t in self.tasks if t.concept))

    def blocks_of(self, module: str) -> tuple[int, ...]:
        """The ranks stacked in a module, oldest first; empty if they were not recorded."""
        return tuple(self.blocks.get(module, self.blocks.get("*", ())))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _load(metadata: Mapping[str, str], name: str, default: Any) -> Any:
    value = json.loads(metadata.get(f"ss_lcp_{name}") or json.dumps(default))
    if not isinstance(value, type(default)):
        raise TypeError(f"ss_lcp_{name} is no {type(default).__name__}")
    return value


def _source_from(data: Mapping[str, Any]) -> Source:
    weight = data.get("weight")
    return Source(str(data["name"]), str(data["hash"]), None if weight is None else float(weight))


def collect_blocks(ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Ranks stacked per module, the commonest under `*`: short enough for a header."""
    every = [tuple(blocks) for blocks in ranks.values()]
    if not every:
        return {}
    common = max(dict.fromkeys(every), key=every.count)
    named = {name: tuple(blocks) for name, blocks in ranks.items() if tuple(blocks) != common}
    return {"*": common, **named}


# ------------------------------------------------------------------------------ kohya's headers

_SESSION_KEYS = (  # in the order of sd-scripts' train_network.py; values by option name or fact
    *("session_id", "training_started_at", "training_finished_at", "output_name", "learning_rate"),
    *("text_encoder_lr", "unet_lr", "num_train_images", "num_validation_images", "num_reg_images"),
    *("num_batches_per_epoch", "num_epochs", "epoch", "steps", "gradient_checkpointing"),
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
    *("sd_model_name", "sd_model_hash", "new_sd_model_hash", "vae_name", "vae_hash"),
    *("new_vae_hash", "batch_size_per_device", "total_batch_size", "resolution", "color_aug"),
    *("flip_aug", "random_crop", "shuffle_caption", "enable_bucket", "bucket_no_upscale"),
    *("min_bucket_reso", "max_bucket_reso", "keep_tokens", "dataset_dirs", "reg_dataset_dirs"),
    *("tag_frequency", "bucket_info"),
)
_JSON_KEYS = ("network_args", "dataset_dirs", "reg_dataset_dirs", "tag_frequency", "bucket_info")
_OTHER_OPTION = {  # fact -> the option of another name that it repeats
    "debiased_estimation": "debiased_estimation_loss",
    "optimizer": "optimizer_type",
    "sd_model_name": "pretrained_model_name_or_path",
    "vae_name": "vae",
    "batch_size_per_device": "train_batch_size",
    "total_batch_size": "train_batch_size",
}
_FIXED = {
    "network_module": "networks.lora",  # the format of the file, whoever wrote it
    "base_model_version": "sdxl_base_v1-0",
    "v2": False,
    "sd_scripts_commit_hash": "(none)",
}


def kohya_header(
    options: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """All `ss_*` entries that sd-scripts writes, as text: None is "None", True is "True".

    Args:
        options: kohya's options by name (network_dim, learning_rate, ...).
        facts: what no option says, by key without `ss_`: session_id, steps, num_train_images,
            tag_frequency (a dict), ...; they win over options.
    """
    known = {**_FIXED, **(facts or {})}
    header = {}
    for key in _SESSION_KEYS:
        value = known.get(key, options.get(_OTHER_OPTION.get(key, key)))
        if key in _JSON_KEYS:
            value = value if isinstance(value, str) else json.dumps(value or {}, ensure_ascii=False)
        header[f"ss_{key}"] = str(value)
    return header


def tag_frequency(tasks: Iterable[TaskRecord]) -> dict[str, dict[str, int]]:
    """kohya's ss_tag_frequency of a sequence: front ends show its words as trigger words."""
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
    return {f"modelspec.{key}": value for key, value in values.items() if value}


# ------------------------------------------------------------------------- what any header says


@dataclass(frozen=True)
class Summary:
    """What can be learned from a LoRA's header, whoever wrote it. Empty: not said."""

    tool: str = ""  # lcp_plugin, kohya sd-scripts, OneTrainer, ai-toolkit, diffusers, ...
    title: str = ""
    base: str = ""
    date: str = ""
    triggers: tuple[str, ...] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)  # folder -> "12 images x 10"
    options: Mapping[str, Any] = field(default_factory=dict)  # in kohya's words


def summarise(metadata: Mapping[str, str]) -> Summary:
    """Read a header of lcp_plugin, kohya, OneTrainer or ai-toolkit; never fails."""
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
    return Summary(
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


def _tool_of(metadata: Mapping[str, str]) -> str:
    if "ss_lcp_format" in metadata:
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


_SAME_NAME = (
    *("learning_rate", "unet_lr", "text_encoder_lr", "network_dim", "network_alpha", "seed"),
    *("lr_scheduler", "lr_warmup_steps", "max_train_steps", "gradient_accumulation_steps"),
    *(
        "gradient_checkpointing",
        "mixed_precision",
        "max_grad_norm",
        "noise_offset",
        "min_snr_gamma",
    ),
    *("network_dropout", "prior_loss_weight", "flip_aug", "shuffle_caption", "enable_bucket"),
    *("caption_dropout_rate", "loss_type", "zero_terminal_snr", "max_token_length"),
)


def _kohya_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    options = {name: _value(metadata.get(f"ss_{name}")) for name in _SAME_NAME}
    options["train_batch_size"] = _value(metadata.get("ss_batch_size_per_device"))
    options["pretrained_model_name_or_path"] = _value(metadata.get("ss_sd_model_name"))
    optimizer = metadata.get("ss_optimizer", "None").split("(")[0].rsplit(".", 1)[-1]
    options["optimizer_type"] = _value(optimizer)
    side = metadata.get("ss_resolution", "").strip("()").replace(" ", "")
    options["resolution"] = None if side == "None" else side or None
    options["network_args"] = [
        f"{k}={v}" for k, v in (_as_dict(metadata.get("ss_network_args"))).items()
    ] or None
    return {name: value for name, value in options.items() if value is not None}


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
        str(name): f"{facts.get('img_count', '?')} images x {facts.get('n_repeats', 1)}"
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
