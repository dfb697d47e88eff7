"""The header of what is delivered: kohya's ss_*, Stability's modelspec.*, our ss_lcp_*."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.metadata import strip_metadata
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.files import hash_file
from lcp_plugin.hooks import Carry
from lcp_plugin.provenance import header_of_run
from lcp_plugin.starting import common_shape
from lcp_plugin.store import TaskFolder, deliverable_header


def make_header(
    carry: Carry,
    adapter: Adapter,
    folders: Sequence[TaskFolder],
    title: str,
    options: Options,
    prediction_type: str,
) -> dict[str, str]:
    """The whole header of a run's LoRA; with no_metadata what readers cannot do without.

    `adapter`: what the file will hold; its rank and alpha are told, not those of the options (the
    ranks of several tasks add up, and a file of network_weights keeps its own).
    `folders`: the run's tasks so far, at least one.
    """
    facts = folders[-1].lineage
    strategy, base = facts["strategy"], facts["base"]
    header = {
        **header_of_run(folders, title),
        **deliverable_header(carry, strategy["name"], strategy["args"], base["name"], base["hash"]),
        **_facts_of_data(folders),
        **_facts_of_vae(options),
    }
    if adapter:
        rank, alpha = common_shape(adapter)
        header |= {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    header["modelspec.prediction_type"] = "v" if prediction_type.startswith("v") else "epsilon"
    if options.min_timestep is not None or options.max_timestep is not None:
        span = (options.min_timestep or 0, options.max_timestep or 1000)
        header["modelspec.timestep_range"] = f"{span[0]},{span[1]}"
    return strip_metadata(header) if options.no_metadata else header


def describe_data(data: TaskData, validation: TaskData | None, processes: int) -> dict[str, Any]:
    """What lineage.json and the header say of a task's images."""
    return {
        "fingerprint": data.fingerprint,
        "resolution": list(data.resolution),
        "images": data.num_images,
        "reg_images": data.num_reg_images,
        "validation_images": 0 if validation is None else validation.num_images,
        "batches_per_epoch": data.num_batches_per_epoch,
        "steps_per_epoch": data.steps_per_epoch(processes),
        "buckets": {f"{w}x{h}": count for (w, h), count in data.bucket_counts.items()},
    }


def _facts_of_data(folders: Sequence[TaskFolder]) -> dict[str, str]:
    """kohya's counts of the newest task's images and epochs; sums of images over the run."""
    every: list[Mapping[str, Any]] = [folder.lineage.get("data", {}) for folder in folders]
    newest, training = every[-1], folders[-1].lineage.get("training", {})
    per_epoch = int(newest.get("steps_per_epoch", 0)) or 1
    epochs = -(-int(training.get("steps", 0)) // per_epoch)
    buckets = {
        str(i): {"resolution": [int(side) for side in size.split("x")], "count": count}
        for i, (size, count) in enumerate(dict(newest.get("buckets", {})).items())
    }
    return {
        **_sizes(newest.get("resolution")),
        "ss_num_reg_images": str(sum(int(d.get("reg_images", 0)) for d in every)),
        "ss_num_validation_images": str(sum(int(d.get("validation_images", 0)) for d in every)),
        "ss_num_batches_per_epoch": str(newest.get("batches_per_epoch", 0)),
        "ss_num_epochs": str(epochs),
        "ss_epoch": str(epochs),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _sizes(used: Sequence[int] | None) -> dict[str, str]:
    """The size that was trained at; the option may leave it to the base or to data sets."""
    if not used:
        return {}
    width, height = used
    return {"modelspec.resolution": f"{width}x{height}", "ss_resolution": f"({width}, {height})"}


def _facts_of_vae(options: Options) -> dict[str, str]:
    """Name and hash of a replacement VAE in a file."""
    if not options.vae:
        return {}
    path = Path(options.vae).expanduser()
    facts = {"ss_vae_name": path.name}
    if path.is_file():
        facts["ss_new_vae_hash"] = hash_file(path)
    return facts
