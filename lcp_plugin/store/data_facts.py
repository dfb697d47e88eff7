"""What lineage.json and headers say of a task's images, in kohya's words and by kohya's counts.

Per data set what sd-scripts writes into ss_datasets (train_network.py at 48d368fa): images count
with their repeats, regularisation images as they lie there, tags as they stand in the captions.
Folders are named without their path. Where we differ: of metadata files without tags the captions
are counted, and a data set without buckets says its one size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcp_plugin.config.datasets import DatasetConfig, SubsetConfig
from lcp_plugin.data.buckets import Bucketing
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.data.examples import ExampleSet
from lcp_plugin.formats.header import count_tags

SUBSET_FACTS = (  # a subset's own settings, as ss_datasets names them
    *("num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens"),
    *("keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix"),
    *("caption_suffix", "resize_interpolation"),
)


def describe_data(data: TaskData, validation: TaskData | None, processes: int) -> dict[str, Any]:
    """What lineage.json and the header say of a task's images."""
    held_out = 0 if validation is None else validation.num_repeated_images
    return {
        "fingerprint": data.fingerprint,
        "resolution": list(data.resolution),
        "images": data.num_images,
        "reg_images": data.num_reg_images,
        "validation_images": held_out,
        "batches_per_epoch": data.num_batches_per_epoch,
        "steps_per_epoch": data.steps_per_epoch(processes),
        "total_steps": data.total_steps(processes),
        "buckets": {f"{w}x{h}": count for (w, h), count in data.bucket_counts.items()},
        "tables": data.task.has_tables,
        "datasets": [_describe_dataset(d, s, data.native) for d, s in data.examples_by_dataset],
    }


def _describe_dataset(
    dataset: DatasetConfig, found: ExampleSet, native: tuple[int, int]
) -> dict[str, Any]:
    """One data set as an entry of ss_datasets."""
    resolution = Bucketing(dataset, native).resolution
    buckets = dataset.enable_bucket
    counts = [
        len(captions) * subset.num_repeats
        for subset, captions in zip(dataset.subsets, found.captions, strict=True)
    ]
    regular = [subset.is_reg for subset in dataset.subsets]
    interpolations = {subset.resize_interpolation for subset in dataset.subsets}
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(n for n, reg in zip(counts, regular, strict=True) if not reg),
        "num_reg_images": sum(n for n, reg in zip(counts, regular, strict=True) if reg),
        "resolution": list(resolution),
        "enable_bucket": buckets,
        "min_bucket_reso": min(dataset.min_bucket_reso, *resolution) if buckets else None,
        "max_bucket_reso": max(dataset.max_bucket_reso, *resolution) if buckets else None,
        "tag_frequency": _tags(dataset.subsets, found.captions),
        "bucket_info": _bucket_info(found),
        "resize_interpolation": interpolations.pop() if len(interpolations) == 1 else None,
        "subsets": [
            _describe_subset(subset, len(captions))
            for subset, captions in zip(dataset.subsets, found.captions, strict=True)
        ],
    }


def _describe_subset(subset: SubsetConfig, images: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"img_count": images}
    facts |= {name: getattr(subset, name) for name in SUBSET_FACTS}
    if str(subset.image_dir) not in ("", "."):
        facts["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return facts | {"metadata_file": subset.metadata_file.name}
    return facts | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _tags(
    subsets: Sequence[SubsetConfig], captions: Sequence[Sequence[str]]
) -> dict[str, dict[str, int]]:
    """Folder -> tag -> count; two folders of one name are counted together, as with kohya."""
    table: dict[str, dict[str, int]] = {}
    for subset, texts in zip(subsets, captions, strict=True):
        name, texts = subset.image_dir.name, list(texts)
        if subset.metadata_file is not None:
            name, texts = subset.metadata_file.name, _only_tags(subset.metadata_file, texts)
        counts = table.setdefault(name, {})
        for tag, count in count_tags(texts).items():
            counts[tag] = counts.get(tag, 0) + count
    return table


def _only_tags(path: Path, captions: list[str]) -> list[str]:
    """A metadata file's `tags`, which kohya counts alone; the captions where there are none."""
    entries = json.loads(path.read_text(encoding="utf-8-sig"))
    tags = [e.get("tags") for e in entries.values() if isinstance(e, Mapping)]
    return [str(text) for text in tags if text] or captions


def _bucket_info(found: ExampleSet) -> dict[str, Any]:
    """Images of an epoch per bucket, and the mean error of the aspect ratio."""
    errors = [
        abs(e.placement.bucket[0] / e.placement.bucket[1] - e.size[0] / e.size[1])
        for e in found.examples
    ]
    buckets = {
        str(number): {"resolution": list(size), "count": len(indices)}
        for number, (size, indices) in enumerate(found.buckets().items())
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors) if errors else 0}


# ------------------------------------------------------------------- of several tasks together


def merge_tables(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ss_tag_frequency and the dataset_dirs of `describe_data`'s facts of each task, together.

    Within a task a folder of several data sets is counted once, and its further entries among the
    dataset_dirs are numbered, as with kohya. Tasks are told apart: `images`, `images (2)`.
    """
    tags: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    regular: dict[str, Any] = {}
    for task in tasks:
        own: dict[str, Any] = {}
        for dataset in task.get("datasets", ()):
            for name, counts in dataset["tag_frequency"].items():
                own.setdefault(name, counts)
            for subset in dataset["subsets"]:
                table = regular if subset.get("is_reg") else trained
                name = subset.get("metadata_file") or subset.get("image_dir", "")
                entry = {"n_repeats": subset["num_repeats"], "img_count": subset["img_count"]}
                table[_free_name(name, table)] = entry
        tags |= {_free_name(name, tags): counts for name, counts in own.items()}
    return {"tag_frequency": tags, "dataset_dirs": trained, "reg_dataset_dirs": regular}


def _free_name(name: str, table: Mapping[str, Any]) -> str:
    number, free = 2, name
    while free in table:
        free, number = f"{name} ({number})", number + 1
    return free
