"""What kohya's header says of a training that no option does, from what task folders record.

Of several tasks counts of work add up (images, steps, max_train_steps), and settings are those of
the newest. Keys are kohya's without `ss_`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.formats.header import epoch_seconds, tag_frequency
from lcp_plugin.formats.identity import hash_file, short_hash
from lcp_plugin.store.data_facts import merge_tables
from lcp_plugin.store.task_folder import TaskFolder


def facts_of_run(folders: Sequence[TaskFolder], options: Mapping[str, Any]) -> dict[str, Any]:
    """All of them.  `options`: of the newest task, defaults included."""
    newest = folders[-1].lineage
    sessions = [folder.lineage.get("session", {}) for folder in folders]
    facts = {
        "session_id": _number(sessions[-1].get("id")),
        "training_started_at": epoch_seconds(sessions[0].get("started_at")),
        "training_finished_at": epoch_seconds(sessions[-1].get("finished_at")),
        "seed": newest.get("seed"),
        **facts_of_base(newest.get("base", {})),
        **facts_of_vae(options["vae"]),
        **_counts(folders, options),
        **_facts_of_data(folders, options),
    }
    used = newest.get("training", {}).get("optimizer")  # the option's may have been replaced
    return {**facts, "optimizer": _as_defined(used)} if used else facts


def _as_defined(used: str) -> str:
    """torch's optimizers by the module that defines them, as sd-scripts names a class; others as
    they were asked for, since nothing that a record names is imported.
    """
    path, bracket, arguments = used.partition("(")
    known = getattr(torch.optim, path.removeprefix("torch.optim."), None)
    if path.startswith("torch.optim.") and isinstance(known, type):
        path = f"{known.__module__}.{known.__name__}"
    return f"{path}{bracket}{arguments}"


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


# ------------------------------------------------------------------------------- base and VAE


def facts_of_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """Name and hashes of the base, without its path; a folder's hash is our own."""
    name = str(base.get("origin") or base.get("name") or "")
    path = Path(name).expanduser()
    if path.is_file():
        hashes = {"sd_model_hash": short_hash(path), "new_sd_model_hash": hash_file(path)}
        return {"sd_model_name": path.name, **hashes}
    shown = os.path.basename(name.rstrip("/\\")) if path.exists() else name
    whole = None if base.get("added") else base.get("hash")
    return {"sd_model_name": shown or None, "new_sd_model_hash": whole}


def facts_of_vae(vae: str | None) -> dict[str, Any]:
    """Name of a replacement VAE, and its hashes where it is one file."""
    if not vae:
        return {}
    path = Path(vae).expanduser()
    if path.is_file():
        hashes = {"vae_hash": short_hash(path), "new_vae_hash": hash_file(path)}
        return {"vae_name": path.name, **hashes}
    return {"vae_name": path.name if path.exists() else vae}
