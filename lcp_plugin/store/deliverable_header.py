"""The whole header of a file with learned tasks: one home for the trainer, exports, merges and
sd-scripts.

`header` words the entries that others read, `lineage` ours; here they are filled from what a run's
task folders record (`make_header`), from what sd-scripts gave (`complete_header`), or from the
lineage of a merge alone (`header_of_merge`). Of several tasks counts of work add up (images, steps,
max_train_steps), and settings are those of the newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.metadata import strip_metadata
from lcp_plugin.config.options import Options
from lcp_plugin.formats.header import (
    epoch_seconds,
    kohya_header,
    minimal_header,
    modelspec_header,
    size_header,
    tag_frequency,
)
from lcp_plugin.formats.identity import hash_file
from lcp_plugin.formats.lineage import Lineage, Source
from lcp_plugin.hooks import Carry
from lcp_plugin.store.carries import lineage_of
from lcp_plugin.store.data_facts import merge_tables
from lcp_plugin.store.task_folder import TaskFolder

MODELSPEC_NAMES = "metadata_"  # options of this prefix become modelspec.*


def make_header(
    carry: Carry, adapter: Adapter, folders: Sequence[TaskFolder], title: str
) -> dict[str, str]:
    """The whole header of a run's LoRA; with no_metadata what readers cannot do without.

    `adapter`: what the file will hold.  `folders`: the run's tasks so far, at least one.
    """
    newest = folders[-1].lineage
    strategy, base = newest["strategy"], newest["base"]
    options = {**asdict(Options()), **newest.get("options", {})}
    lineage = replace(
        lineage_of(carry, strategy["name"], strategy["args"], base["name"], base["hash"]),
        parents=_parent_source(folders[0].lineage.get("parent", {})),
        seeds={"seed": newest.get("seed"), "order_seed": options.get("order_seed")},
        versions=dict(newest.get("versions", {})),
        options=newest.get("options", {}),
    )
    facts = {**_facts_of_run(folders, options), "output_name": options["output_name"] or title}
    header = {
        **kohya_header(options, facts),
        **_modelspec(folders, options, lineage, title),
        **lineage.to_metadata(),
        **size_header(adapter),
    }
    return strip_metadata(header) if options["no_metadata"] else header


def _modelspec(
    folders: Sequence[TaskFolder], options: Mapping[str, Any], lineage: Lineage, title: str
) -> dict[str, str]:
    """Stability's entries, with what the metadata_* options say."""
    newest = folders[-1].lineage
    predicts_v = str(newest.get("prediction_type", "")).startswith("v")
    given = {
        name.removeprefix(MODELSPEC_NAMES): str(value)
        for name, value in options.items()
        if name.startswith(MODELSPEC_NAMES) and name != "metadata_title" and value
    }
    least, most = options["min_timestep"], options["max_timestep"]
    if least is not None or most is not None:
        given["timestep_range"] = f"{least or 0},{most or 1000}"
    used = newest.get("data", {}).get("resolution")
    return modelspec_header(
        options["metadata_title"] or title,
        resolution=f"{used[0]}x{used[1]}" if used else _resolution(options["resolution"]),
        prediction_type="v" if predicts_v or options["v_parameterization"] else "epsilon",
        triggers=tuple(dict.fromkeys(r.concept for r in folders[-1].records)),
        version=lineage.versions.get("lcp_plugin", ""),
        extra=given,
    )


def _resolution(value: Any) -> str:
    """WxH of kohya's resolution option, which may be one number or two."""
    sides = re.findall(r"\d+", str(value or 1024))
    return f"{sides[0]}x{sides[-1]}" if sides else "1024x1024"


# ---------------------------------------------------------------------- what kohya's header counts


def _facts_of_run(folders: Sequence[TaskFolder], options: Mapping[str, Any]) -> dict[str, Any]:
    """What kohya's header says that no option does."""
    newest = folders[-1].lineage
    sessions = [folder.lineage.get("session", {}) for folder in folders]
    facts = {
        "session_id": _number(sessions[-1].get("id")),
        "training_started_at": epoch_seconds(sessions[0].get("started_at")),
        "training_finished_at": epoch_seconds(sessions[-1].get("finished_at")),
        "seed": newest.get("seed"),
        **_facts_of_base(newest.get("base", {})),
        **_facts_of_vae(options["vae"]),
        **_counts(folders, options),
        **_facts_of_data(folders, options),
    }
    used = newest.get("training", {}).get("optimizer")  # the option's may have been replaced
    return {**facts, "optimizer": used} if used else facts


def _number(session: Any) -> int | None:
    """kohya's session ids are whole numbers, ours hexadecimal ones."""
    try:
        return int(str(session), 16)
    except ValueError:
        return None


def _counts(folders: Sequence[TaskFolder], options: Mapping[str, Any]) -> dict[str, int]:
    """Images with repeats, steps and epochs."""
    every: list[Mapping[str, Any]] = [folder.lineage.get("data", {}) for folder in folders]
    steps = [int(f.lineage.get("training", {}).get("steps", 0)) for f in folders]
    planned = [int(d.get("total_steps", n)) for d, n in zip(every, steps, strict=True)]
    newest, processes = every[-1], int(folders[-1].lineage.get("session", {}).get("processes", 1))
    per_epoch = int(newest.get("steps_per_epoch", 0)) or 1
    epochs = -(-planned[-1] // per_epoch)
    images = [_sum(d, "num_train_images", d.get("images", 0)) for d in every]
    regular = [_sum(d, "num_reg_images", d.get("reg_images", 0)) for d in every]
    return {
        "num_train_images": sum(images),
        "num_reg_images": sum(regular),
        "num_validation_images": sum(int(d.get("validation_images", 0)) for d in every),
        "num_batches_per_epoch": -(-int(newest.get("batches_per_epoch", 0)) // processes),
        "num_epochs": epochs,
        "epoch": epochs if steps[-1] >= planned[-1] else steps[-1] // per_epoch,
        "steps": sum(steps),
        "max_train_steps": sum(planned),
    }


def _sum(data: Mapping[str, Any], key: str, otherwise: Any) -> int:
    sets = data.get("datasets")
    return sum(int(d[key]) for d in sets) if sets else int(otherwise)


def _facts_of_data(folders: Sequence[TaskFolder], options: Mapping[str, Any]) -> dict[str, Any]:
    """Folders and tags; of tables the data sets themselves, of folders the options' settings."""
    every = [folder.lineage.get("data", {}) for folder in folders]
    chained = bool(folders[0].lineage.get("parent", {}).get("hash"))
    inherited = tag_frequency(folders[0].records[:-1] if chained else ())
    if not all(data.get("datasets") for data in every):  # folders of an early version
        return {"tag_frequency": tag_frequency(folders[-1].records)}
    merged = merge_tables(every)
    sets = [dataset for data in every for dataset in data["datasets"]]
    told = {
        "tag_frequency": {**inherited, **merged["tag_frequency"]},
        "dataset_dirs": merged["dataset_dirs"],
    }
    if any(data["tables"] for data in every):
        return {**told, "datasets": sets}
    told["reg_dataset_dirs"] = merged["reg_dataset_dirs"]
    told |= {"datasets": sets} if len(folders) > 1 else {}
    return {**told, **_flat(every[-1], folders[-1], options)}


def _flat(
    data: Mapping[str, Any], folder: TaskFolder, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a task's only data set, as kohya states them of folders."""
    dataset = data["datasets"][0]
    processes = int(folder.lineage.get("session", {}).get("processes", 1))
    together = processes * int(options["gradient_accumulation_steps"])
    names = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
    return {
        **{name: options[name] for name in names},
        "batch_size_per_device": dataset["batch_size_per_device"],
        "total_batch_size": dataset["batch_size_per_device"] * together,
        "resolution": tuple(dataset["resolution"]),
        "enable_bucket": dataset["enable_bucket"],
        "bucket_no_upscale": dataset["enable_bucket"] and bool(options["bucket_no_upscale"]),
        "min_bucket_reso": dataset["min_bucket_reso"],
        "max_bucket_reso": dataset["max_bucket_reso"],
        "bucket_info": dataset["bucket_info"],
    }


# ------------------------------------------------------------------------- base, VAE and parents


def _facts_of_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """Name and hashes of the base, without its path; a folder's hash is our own."""
    name = str(base.get("origin") or base.get("name") or "")
    path = Path(name).expanduser()
    if path.is_file():
        hashes = {"sd_model_hash": legacy_hash(path), "new_sd_model_hash": hash_file(path)}
        return {"sd_model_name": path.name, **hashes}
    shown = os.path.basename(name.rstrip("/\\")) if path.exists() else name
    whole = None if base.get("added") else base.get("hash")
    return {"sd_model_name": shown or None, "new_sd_model_hash": whole}


def _facts_of_vae(vae: str | None) -> dict[str, Any]:
    """Name of a replacement VAE, and its hashes where it is one file."""
    if not vae:
        return {}
    path = Path(vae).expanduser()
    if path.is_file():
        hashes = {"vae_hash": legacy_hash(path), "new_vae_hash": hash_file(path)}
        return {"vae_name": path.name, **hashes}
    return {"vae_name": path.name if path.exists() else vae}


def legacy_hash(path: Path) -> str:
    """The short hash of a checkpoint by which old front ends know it: of 64 KiB at 1 MiB."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _parent_source(parent: Mapping[str, Any]) -> tuple[Source, ...]:
    """What the run's first task was chained on; the name only, not the path to it."""
    if not parent.get("hash"):
        return ()
    return (Source(Path(str(parent.get("source") or "parent")).name, str(parent["hash"])),)


# ------------------------------------------------------------------ of sd-scripts, and of merges


def counts_of(header: Mapping[str, str]) -> dict[str, int]:
    """Images and steps that sd-scripts tells of a training, for the task's record."""
    facts: dict[str, int] = {}
    try:
        folders = json.loads(header.get("ss_dataset_dirs", "{}"))
        facts["images"] = sum(int(f["img_count"]) for f in folders.values())
        facts["steps"] = int(header["ss_steps"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {name: count for name, count in facts.items() if count}


def complete_header(
    given: Mapping[str, str], adapter: Adapter, lineage: Lineage, inherited: int
) -> dict[str, str]:
    """What sd-scripts says of its training, with our lineage, trigger words, and the rank and alpha
    that the file really has. `inherited`: tasks of the parent, whose words are added.
    """
    title = given.get("modelspec.title") or given.get("ss_output_name") or "lora"
    spec = modelspec_header(title, triggers=lineage.triggers)
    if any(key.startswith("modelspec.") for key in given):
        spec = {"modelspec.trigger_phrase": spec.get("modelspec.trigger_phrase", "")}
    try:
        own = json.loads(given.get("ss_tag_frequency") or "{}")
    except ValueError:
        own = {}
    words = lineage.tasks[:inherited] if own else lineage.tasks
    tags = {**tag_frequency(words), **(own if isinstance(own, dict) else {})}
    added = {"ss_tag_frequency": json.dumps(tags, ensure_ascii=False)}
    return {**given, **spec, **added, **size_header(adapter), **lineage.to_metadata()}


def header_of_merge(
    lineage: Lineage, title: str, merged_from: Sequence[str], extra: Mapping[str, str]
) -> dict[str, str]:
    """The header of a file that a tool put together: what it is, its words, its parts.

    `extra`: entries beside these, or instead of them; "" takes one away.
    """
    version = lineage.versions.get("lcp_plugin", "")
    spec = modelspec_header(
        title, triggers=lineage.triggers, merged_from=merged_from, version=version
    )
    header = {**minimal_header(title, lineage.tasks), **spec, **lineage.to_metadata(), **extra}
    return {key: value for key, value in header.items() if extra.get(key, "said")}
