"""Data sets of a task: folders, repeats and caption rules, every value resolved.

Precedence per key, as in kohya's dataset files (library/config_util.py at 48d368fa): subset over
dataset over general over command line and config over default. Folder names `<repeats>_<class>`
count in train_data_dir and reg_data_dir only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import UNSET, Unfit, convert, convert_option
from lcp_plugin.config.findings import Findings, did_you_mean
from lcp_plugin.config.folders import describe_left_out, list_images
from lcp_plugin.config.options import Options, option_fields, option_types

_REPEATS = re.compile(r"^(\d+)(?:_(.*))?$")


@dataclass(frozen=True)
class SubsetConfig:
    """Images of one folder and how they are captioned and changed."""

    image_dir: Path
    num_repeats: int = 1
    is_reg: bool = False  # regularisation images: their loss is weighed by prior_loss_weight
    class_tokens: str | None = None  # caption of images without a caption file
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    caption_extension: str = ".caption"
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share buckets and a batch size."""

    subsets: tuple[SubsetConfig, ...]
    batch_size: int = 1
    resolution: tuple[int, int] | None = None  # (width, height); None: the base's native size
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    skip_image_resolution: tuple[int, int] | None = None  # images of no more pixels are left out
    validation_split: float = 0.0
    validation_seed: int | None = None


_RENAMED = {"batch_size": "train_batch_size"}
DATASET_KEYS = tuple(f.name for f in fields(DatasetConfig) if f.name != "subsets")
SUBSET_KEYS = tuple(f.name for f in fields(SubsetConfig))
_ONLY_SUBSET = ("image_dir", "is_reg", "metadata_file")
_NO_EFFECT = {  # key -> why; "": as the option of this name
    "cache_info": "",
    "face_crop_aug_range": "",
    "network_multiplier": "a task's factors have one strength",
}
_EXTRA_TYPES: dict[str, Any] = {
    "image_dir": str,
    "is_reg": bool,
    "num_repeats": int,
    "class_tokens": str,
    "metadata_file": str,
    "network_multiplier": float,
}
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir")


@dataclass(frozen=True)
class DatasetReader:
    """Builds data sets from tables and folders, for one task's options."""

    options: Options
    findings: Findings
    source: str  # file in which the task stands, for messages
    roots: tuple[Path, ...]  # where relative image folders are looked for, in order

    def locate(self, name: str) -> Path:
        """The folder or file that a relative path means; the first root's if none has it."""
        candidates = [root.expanduser() / Path(name).expanduser() for root in self.roots]
        return next((c for c in candidates if c.exists()), candidates[0])

    def defaults(self, folder: Path, **given: Any) -> SubsetConfig:
        """A subset with the options' values."""
        values = {k: getattr(self.options, k) for k in SUBSET_KEYS if k in option_fields()}
        mask_dir = values.pop("conditioning_data_dir")
        if mask_dir and self.options.masked_loss:
            values["conditioning_data_dir"] = self.locate(mask_dir)
        return SubsetConfig(image_dir=folder, **{**values, **given})

    def dataset(self, subsets: Iterable[SubsetConfig]) -> DatasetConfig:
        """A data set with the options' values."""
        values = {k: getattr(self.options, _RENAMED.get(k, k)) for k in DATASET_KEYS}
        return DatasetConfig(subsets=tuple(subsets), **values)

    def from_folders(self) -> tuple[DatasetConfig, ...]:
        """train_data_dir and reg_data_dir, or in_json, as one data set."""
        subsets: list[SubsetConfig] = []
        if self.options.in_json:
            subsets.append(self._from_metadata(self.options.in_json))
        elif self.options.train_data_dir:
            subsets += self.parent_folder(self.options.train_data_dir, "train_data_dir", False)
        if self.options.reg_data_dir and subsets:
            subsets += self.parent_folder(self.options.reg_data_dir, "reg_data_dir", True)
        return (self.dataset(subsets),) if subsets else ()

    def _from_metadata(self, name: str) -> SubsetConfig:
        folder = self.locate(self.options.train_data_dir or ".")
        path = self.locate(name)
        if not path.is_file():
            self.findings.problem(self.source, f"in_json {name!r} is not a file; correct its path.")
        return self.defaults(folder, metadata_file=path, num_repeats=self.options.dataset_repeats)

    def parent_folder(self, name: str, key: str, is_reg: bool) -> list[SubsetConfig]:
        """Subsets of a folder of `<repeats>_<class>` folders, or of images."""
        parent = self.locate(name)
        if not self.is_folder(parent, key, name):
            return []
        subsets, ignored = [], []
        for folder in sorted(p for p in parent.iterdir() if p.is_dir()):
            match = _REPEATS.match(folder.name)
            if not match or int(match[1]) == 0:
                ignored.append(folder.name)
                continue
            subset = self.defaults(
                folder, num_repeats=int(match[1]), class_tokens=match[2] or None, is_reg=is_reg
            )
            subsets += [subset] if self.has_images(folder, key) else []
        if list_images(parent):
            self.findings.notice(
                f"{key}: the images directly in {name} are used once each; "
                f"a folder named 10_class repeats them."
            )
            subsets.append(self.defaults(parent, is_reg=is_reg))
        if ignored:
            self.findings.notice(
                f"{key}: folders not named <repeats>_<class> are ignored: {', '.join(ignored)}"
            )
        if not subsets:
            self.findings.problem(
                self.source,
                f"{key} {name!r} holds no images and no folder named <repeats>_<class> "
                f"(for example 10_sks dog); put images there.",
            )
        return subsets

    def is_folder(self, folder: Path, key: str, name: str) -> bool:
        """Whether it exists; a problem if not."""
        if folder.is_dir():
            return True
        places = ", ".join(str(root) for root in self.roots)
        what = "is a file, not a folder" if folder.is_file() else f"does not exist (in {places})"
        self.findings.problem(
            self.source, f"{key} {name!r} {what}; correct the path or set data_root."
        )
        return False

    def has_images(self, folder: Path, key: str) -> bool:
        """Whether images are directly in it; a problem if not."""
        if list_images(folder):
            return True
        self.findings.problem(
            self.source,
            f"{key} '{folder}' holds no images; put some there or correct the path. "
            f"{describe_left_out(folder)}".strip(),
        )
        return False

    def from_table(self, table: Mapping[str, Any], source: str) -> tuple[DatasetConfig, ...]:
        """The data sets of a dataset file or of inline tables (`general`, `datasets`)."""
        extra = [key for key in table if key not in ("general", "datasets")]
        for key in extra:
            hint = did_you_mean(key, ("general", "datasets"))
            self.findings.problem(
                source, f"unknown key {key!r}; at the top stand general and datasets only.{hint}"
            )
        reader = replace(self, source=source)
        general = reader.values(table.get("general", {}), "general", (*DATASET_KEYS, *SUBSET_KEYS))
        sets = table.get("datasets", [])
        if not isinstance(sets, list) or not sets:
            self.findings.problem(source, "datasets: wanted at least one [[datasets]] table.")
            return ()
        before = len(self.findings.problems)
        read = [reader._one(s, general, f"datasets[{i}]") for i, s in enumerate(sets)]
        filled = tuple(d for d in read if d.subsets)
        if not filled and len(self.findings.problems) == before:
            self.findings.problem(source, "no subset holds images; put some there.")
        return filled

    def _one(self, table: Any, general: dict[str, Any], where: str) -> DatasetConfig:
        values = self.values(table, where, (*DATASET_KEYS, *SUBSET_KEYS, "subsets"))
        shared = {**general, **values}
        base = self.dataset(())
        base = replace(base, **{k: v for k, v in shared.items() if k in DATASET_KEYS})
        tables = table.get("subsets", []) if isinstance(table, Mapping) else []
        if not isinstance(tables, list) or not tables:
            self.findings.problem(
                self.source, f"{where}: wanted at least one [[datasets.subsets]] with image_dir."
            )
            return base
        subsets: list[SubsetConfig] = []
        for number, subtable in enumerate(tables):
            subset = self._subset(subtable, shared, f"{where}.subsets[{number}]")
            if subset and subset.image_dir in [s.image_dir for s in subsets]:
                self.findings.notice(f"{where}: {subset.image_dir} stands twice; used once.")
            elif subset:
                subsets.append(subset)
        if len({s.metadata_file is None for s in subsets}) > 1:
            self.findings.problem(
                self.source, f"{where}: subsets with and without metadata_file do not mix; use two."
            )
        return replace(base, subsets=tuple(subsets))

    def _subset(self, table: Any, shared: dict[str, Any], where: str) -> SubsetConfig | None:
        values = self.values(table, where, SUBSET_KEYS)
        merged = {**{k: v for k, v in shared.items() if k in SUBSET_KEYS}, **values}
        for key in _PATHS:
            if name := str(merged.pop(key, "") or "").strip():
                merged[key] = self.locate(name)
        if "metadata_file" in merged:
            return self._subset_of_metadata(merged, where)
        if "image_dir" not in merged:
            if isinstance(table, Mapping) and not str(table.get("image_dir", "")).strip():
                self.findings.problem(self.source, f"{where}: image_dir is missing.")
            return None
        folder = merged.pop("image_dir")
        if not self.is_folder(folder, f"{where}.image_dir", str(values["image_dir"])):
            return None
        if not list_images(folder):
            self.findings.notice(f"{where}.image_dir '{folder}' holds no images; it is left out.")
            return None
        return self.defaults(folder, **merged)

    def _subset_of_metadata(self, merged: dict[str, Any], where: str) -> SubsetConfig | None:
        path = merged["metadata_file"]
        if not path.is_file():
            self.findings.problem(
                self.source, f"{where}.metadata_file '{path}' is not a file; correct its path."
            )
            return None
        return self.defaults(merged.pop("image_dir", path.parent), **merged)

    def values(self, table: Any, where: str, allowed: tuple[str, ...]) -> dict[str, Any]:
        """The converted values of a table; problems for unknown keys and unfit values."""
        if not isinstance(table, Mapping):
            self.findings.problem(self.source, f"{where}: wanted a table, got {table!r}.")
            return {}
        known = [k for k in allowed if where != "general" or k not in _ONLY_SUBSET]
        result: dict[str, Any] = {}
        for key, value in table.items():
            if key == "subsets" and key in allowed:
                continue
            if key in _NO_EFFECT:
                why = _NO_EFFECT[key] or option_fields()[key].metadata["no_effect"]
                self.findings.notice(f"{key} in {self.source} has no effect here: {why}.")
            elif key not in known:
                hint = did_you_mean(key, known)
                self.findings.problem(self.source, f"{where}: unknown key {key!r}.{hint}")
            else:
                converted = self._convert(key, value, where)
                if converted is not UNSET:
                    result[key] = converted
        return result

    def _convert(self, key: str, value: Any, where: str) -> Any:
        try:
            if key == "custom_attributes":
                return dict(value)
            if key in _EXTRA_TYPES:
                result = convert(value, _EXTRA_TYPES[key])
                if key == "num_repeats" and result < 1:
                    raise Unfit("wanted at least 1")
                return result
            name = _RENAMED.get(key, key)
            return convert_option(option_fields()[name], option_types()[name], value)
        except (ValueError, TypeError) as error:
            self.findings.problem(self.source, f"{where}.{key} = {value!r}: {error}.")
            return UNSET
