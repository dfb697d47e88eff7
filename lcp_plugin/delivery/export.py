"""The learned tasks in other forms, each read back and checked before it takes its place.

    lora         the exact LoRA, kohya's keys          lora:RANK   truncated (QR and a small SVD)
    diff         dense `.diff` keys, kohya's names      diffusers   LoRA in diffusers' layout
    peft         a folder per model with adapter_config.json
    checkpoint   fused into a base: a single-file SDXL checkpoint, or a diffusers folder

Reading back means: what is on disk gives the delta that was to be written, within the rounding of
its type; a truncated one is compared with its own truncated delta.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.delivery.checkpoint import export_checkpoint
from lcp_plugin.delivery.forms import Exported, Form, target_of
from lcp_plugin.delivery.learned import Learned
from lcp_plugin.delivery.whole_folder import replacing_folder, size_of
from lcp_plugin.delta import Entry
from lcp_plugin.errors import ConfigError, FileFormatError
from lcp_plugin.formats.checked_lora import check_lora
from lcp_plugin.formats.disk import replacing, require_free_space
from lcp_plugin.formats.header import size_header
from lcp_plugin.formats.keys import PREFIXES, kohya_name
from lcp_plugin.formats.lora_file import (
    BIAS_READERS,
    portable_adapter,
    refuse_biases,
    write_lora,
)
from lcp_plugin.formats.precisions import check_rounded
from lcp_plugin.formats.tensors import TensorReader, build_header, raw_bytes
from lcp_plugin.store.deliverable_header import derived_header

log = logging.getLogger(__name__)


def export(
    learned: Learned,
    form: Form,
    target: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Export in any form.

    Raises:
        ConfigError: a checkpoint without a base.
    """
    if form.kind == "peft":
        return export_peft(learned, target, dtype)
    if form.kind == "diff":
        return export_diff(learned, target, dtype)
    if form.kind == "checkpoint":
        if base is None:
            raise ConfigError("a checkpoint export needs the base to fuse into: give --base.")
        return export_checkpoint(learned, base, target)
    layout = "diffusers" if form.kind == "diffusers" else "kohya"
    return export_lora(learned, target, layout, form.rank, dtype)


def export_all(
    learned: Learned,
    forms: Sequence[str],
    deliverable: Path,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Exported]:
    """A run's `--export` forms, beside its deliverable, which is itself the form `lora`.

    Raises:
        ConfigError: an unknown form, before anything is written.
    """
    wanted = [Form.parse(text) for text in forms]
    return [
        export(learned, form, target_of(form, deliverable, base), base, dtype)
        for form in wanted
        if form != Form("lora")
    ]


# ------------------------------------------------------------------------------------- adapters


def export_lora(
    learned: Learned,
    path: str | Path,
    layout: str = "kohya",
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """One LoRA file; with a rank, truncated, its relative errors in the header.

    Raises:
        FileFormatError: it does not read back as it was meant.  DiskError: the write failed.
    """
    path, adapter, metadata = Path(path), learned.adapter, dict(learned.metadata)
    errors: dict[str, float] = {}
    overall = 0.0
    if rank:
        full = learned.delta
        short, errors = full.truncate(rank)
        overall = full.overall_error(errors)
        adapter = short.as_adapter()
        lost = _describe_truncation(rank, overall, errors)
        metadata = derived_header(learned.metadata, learned.read_from, truncation=lost)
    if layout.startswith("kohya"):
        adapter = portable_adapter(adapter)
        metadata.update(size_header(adapter))
    with replacing(path) as temporary:
        write_lora(temporary, adapter, metadata, dtype, layout, learned.biases)
        check_lora(temporary, adapter, dtype, learned.biases)
    if learned.biases:
        log.warning("%s %s", path.name, BIAS_READERS)
    return Exported(path, len(adapter), path.stat().st_size, overall, errors)


def _describe_truncation(rank: int, overall: float, errors: Mapping[str, float]) -> dict[str, Any]:
    rounded = {name: round(error, 6) for name, error in errors.items() if error}
    return {"rank": rank, "error": round(overall, 6), "modules": rounded}


def export_peft(
    learned: Learned, folder: str | Path, dtype: torch.dtype = torch.float32
) -> Exported:
    """peft's own form: a folder with adapter_config.json for each model that is changed.

    Reading back checks every key against the names of SDXL's modules. Whether they are those of the
    reader's classes depends on its transformers (`text_model.` is gone from CLIPTextModel in 5),
    and an export has no base at hand: test_peft_export.py loads each folder with peft.
    """
    folder = Path(folder)
    refuse_biases(learned.biases, "a peft folder")
    with replacing_folder(folder) as temporary:
        for prefix in PREFIXES:
            part = learned.adapter.restrict(n for n in learned.adapter if n.startswith(prefix))
            if part:
                file = temporary / prefix[:-1] / "adapter_model.safetensors"
                write_lora(file, part, learned.metadata, dtype, "peft")
                check_lora(file, part, dtype)
    return Exported(folder, len(learned.adapter), size_of(folder))


def export_diff(learned: Learned, path: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Dense `.diff` (and `.diff_b`) keys under kohya's names, written one matrix at a time."""
    path, delta = Path(path), learned.delta
    parts: dict[str, Entry | Tensor] = {f"{kohya_name(m)}.diff": e for m, e in delta.items()}
    parts |= {f"{kohya_name(m)}.diff_b": change for m, change in learned.biases.items()}
    ordered = dict(sorted(parts.items(), key=lambda item: item[0].encode()))
    word = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    layout = {key: (word, _shape_of(part)) for key, part in ordered.items()}
    size = sum(math.prod(shape) for _, shape in layout.values()) * dtype.itemsize
    require_free_space(path.parent, size, f"the dense export {path.name}")
    with replacing(path) as temporary:
        metadata = dict(learned.metadata)
        with temporary.open("wb") as out:
            out.write(build_header(layout, metadata))
            for key, part in ordered.items():
                matrix = _dense_of(part).to(dtype).reshape(layout[key][1]).contiguous()
                out.write(raw_bytes(check_rounded(matrix, key)))
        reader = TensorReader(temporary)
        for key, part in ordered.items():
            wanted = _dense_of(part).to(dtype).reshape(layout[key][1])
            if not torch.equal(reader.read(key), wanted):
                raise FileFormatError(f"{path.name}: {key} does not read back as it was written.")
    return Exported(path, len(delta), path.stat().st_size)


def _dense_of(part: Entry | Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else part.dense()


def _shape_of(entry: Entry | Tensor) -> tuple[int, ...]:
    if isinstance(entry, Tensor):
        return tuple(entry.shape)
    if entry.kernel is None:
        return entry.shape
    height, width = entry.kernel
    return (entry.shape[0], entry.shape[1] // (height * width), height, width)
