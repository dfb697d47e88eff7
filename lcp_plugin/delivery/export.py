"""The learned tasks in other forms, each read back and checked before it takes its place.

    lora         the exact LoRA, kohya's keys          lora:RANK   truncated (QR and a small SVD)
    diff         dense `.diff` keys, kohya's names      diffusers   LoRA in diffusers' layout
    peft         a folder per model with adapter_config.json
    checkpoint   fused into a base: a single-file SDXL checkpoint, or a diffusers folder

Reading back means: what is on disk gives the delta that was to be written, within the rounding of
its type; a truncated one is compared with its own truncated delta.

From an additive chain single tasks can be weighted: D = sum_t w_t U_t. A file knows its tasks'
shares by the ranks that were stacked (`ss_lcp_blocks`), a run by the tasks' own adapters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcp_plugin.adapter import Adapter
from lcp_plugin.delivery.fusing import (
    Fused,
    check_fused,
    checkpoint_slots,
    component_slots,
    few,
    fuse_file,
)
from lcp_plugin.delta import Delta, Entry, Stacked
from lcp_plugin.errors import BaseModelError, ConfigError, DiskError, FileFormatError, LineageError
from lcp_plugin.formats.disk import replacing, require_free_space, sync, write_json
from lcp_plugin.formats.header import size_header
from lcp_plugin.formats.identity import OWN_HASH, file_model_hash, is_as_written
from lcp_plugin.formats.keys import PREFIXES, kohya_name
from lcp_plugin.formats.lineage import Lineage, Source
from lcp_plugin.formats.lora_file import (
    check_lora,
    find_lora,
    portable_adapter,
    read_lora,
    write_lora,
)
from lcp_plugin.formats.peft_config import DIFFUSERS_METADATA
from lcp_plugin.formats.tensors import (
    NAME_OF,
    TensorReader,
    build_header,
    raw_bytes,
    read_header,
)
from lcp_plugin.sdxl.base_weights import BaseSource, check_added, source_of, sum_weights
from lcp_plugin.store.carries import deliverable_adapter
from lcp_plugin.store.deliverable_header import make_header
from lcp_plugin.store.replay import StrategyMaker
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder, list_folders, read_folder

FORMS = ("lora", "diff", "diffusers", "peft", "checkpoint")
MARKER = "lcp_export.json"  # in a folder that we wrote and may replace
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Form:
    """What to export: `lora:64` is Form("lora", 64)."""

    kind: str
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Form:
        """From the command line. Raises ConfigError."""
        kind, _, rank = text.partition(":")
        if kind not in FORMS or (
            rank and (kind != "lora" or not rank.isdecimal() or int(rank) < 1)
        ):
            raise ConfigError(f"--export {text}: use {', '.join(FORMS)}, or lora:RANK.")
        return cls(kind, int(rank or 0))


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    modules: int
    bytes: int
    error: float = 0.0  # of a truncation, relative, overall
    errors: Mapping[str, float] = field(default_factory=dict)  # per module
    rounding_share: float = 0.0  # ||W' - W - D|| / ||D|| of a fuse


@dataclass(frozen=True)
class Learned:
    """What is to be exported: the adapter as a deliverable holds it, and its header."""

    adapter: Adapter
    metadata: Mapping[str, str]
    updates: Mapping[str, Delta] = field(default_factory=dict)  # task -> U_t, if D is their sum
    rest: Delta = field(default_factory=Delta)  # what the chain started from, beside the updates
    source: Source | None = None  # the file or folder that was read
    base: BaseSource | None = None  # what it was trained on, where a lineage tells

    @property
    def delta(self) -> Delta:
        """The total."""
        return Delta.of(self.adapter)

    def checkpoint_delta(self) -> Delta:
        """What a checkpoint gets: the total, and the base_weights that the run's base had.

        Raises:
            LineageError: a base_weights file is gone or has changed.
        """
        if self.base is None:
            return self.delta
        check_added(self.base)
        return self.delta + sum_weights([(Path(path), m) for path, m, _ in self.base.added])

    def derived_metadata(self, **facts: object) -> dict[str, str]:
        """The header of what is no longer this very model: its parent is what was read."""
        metadata = {k: v for k, v in self.metadata.items() if k != "ss_lcp_carry_hash"}
        if "ss_lcp_format" in metadata:
            metadata["ss_lcp_carry"] = "delta"
        if self.source is not None:
            metadata["ss_lcp_parents"] = json.dumps([self.source.to_json()])
        return {**metadata, **{f"ss_lcp_{k}": json.dumps(v) for k, v in facts.items()}}


# --------------------------------------------------------------------------------- what to export


def read_learned(path: str | Path, make_strategy: StrategyMaker) -> Learned:
    """A LoRA file of any kind, a task folder, or a run folder (its last task).

    Raises:
        FileFormatError, LineageError: damaged, or nothing there.
    """
    path = Path(path)
    folder = read_folder(path) if path.is_dir() else None
    if folder is None and path.is_dir() and list_folders(path):
        folder = list_folders(path)[-1]
    if folder is not None:
        return _learned_in_run(folder, make_strategy)
    lora = read_lora(path)
    adapter = Adapter({**lora.delta.as_adapter(), **lora.adapter})
    lineage = Lineage.from_metadata(lora.metadata)
    file = find_lora(path)
    whole = lineage is not None and is_as_written(file, lora.metadata)
    updates = _split_blocks(adapter, lineage) if lineage is not None and whole else {}
    stale: tuple[str, ...] = (
        "sshs_model_hash",
        "sshs_legacy_hash",
        OWN_HASH,
        DIFFUSERS_METADATA,
    )
    stale += () if whole else ("ss_lcp_blocks", "ss_lcp_carry_hash")  # mixed by another tool
    metadata = {k: v for k, v in lora.metadata.items() if k not in stale}
    source = Source(file.name, file_model_hash(file))
    return Learned(adapter, metadata, updates, source=source)


def _learned_in_run(folder: TaskFolder, make_strategy: StrategyMaker) -> Learned:
    store = RunStore(folder.path.parent.parent, folder.path.parent.name)
    folders = [f for f in store.folders() if f.index <= folder.index]
    carry = store.carry_after(folder.index, make_strategy)
    adapter = deliverable_adapter(carry)
    metadata = make_header(carry, adapter, folders, store.name)
    updates = {f.name: Delta.of(f.read_adapter()) for f in folders}
    rest = store.read_parent().carry.total
    if not _is_sum(carry.total, [rest, *updates.values()]):
        updates, rest = {}, Delta()
    source = Source(folder.path.name, folder.lineage["hashes"]["carry"])
    trained_on = source_of(folder.lineage)
    return Learned(adapter, metadata, updates, rest, source, trained_on)


def _is_sum(total: Delta, parts: list[Delta]) -> bool:
    """Whether the parts add up to the total, within fp32."""
    names = set(total).union(*parts)
    for name in names:
        present = [p[name].dense() for p in parts if name in p]
        wanted = total[name].dense() if name in total else torch.zeros(())
        found = torch.stack(present).sum(0) if present else torch.zeros(())
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-6):
            return False
    return True


def _split_blocks(adapter: Adapter, lineage: Lineage) -> dict[str, Delta]:
    """Each task's update, if every module stacks one block per task; else nothing."""
    names = [task.name for task in lineage.tasks]
    shares: dict[str, dict[str, Entry]] = {name: {} for name in names}
    for module, factors in adapter.items():
        blocks = lineage.blocks_of(module)
        if len(blocks) != len(names) or sum(blocks) != factors.rank or len(set(names)) < len(names):
            return {}
        start = 0
        for name, rank in zip(names, blocks, strict=True):
            part = slice(start, start + rank)
            up = factors.up[:, part] * factors.scale
            shares[name][module] = Stacked(up, factors.down[part], (rank,), factors.kernel)
            start += rank
    return {name: Delta(entries) for name, entries in shares.items()}


def _why_not_apart(task: str, learned: Learned, lineage: Lineage | None) -> str:
    """Why a task that the lineage names has no share of its own."""
    strategy = lineage.strategy if lineage else "?"
    start = f"the share of {task} is not kept apart here: "
    if learned.updates:
        return f"{start}it was learned before this run; weigh it where it was learned."
    if strategy in ("merge_init", "merge_ortho_init"):
        return (
            f"{start}the file's factors are not those of its tasks one after another (truncated, "
            "mixed by another tool, or started from a LoRA without lineage); use the run that "
            "learned it."
        )
    return f"{start}strategy {strategy} does not sum its tasks' updates."


def weigh_tasks(learned: Learned, weights: Mapping[str, float]) -> Learned:
    """The same tasks with other weights; 0 leaves one out.

    Raises:
        ConfigError: a task that is not there.
        LineageError: the chain is no sum of its tasks' updates.
    """
    lineage = Lineage.from_metadata(learned.metadata)
    known = [task.name for task in lineage.tasks] if lineage else []
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise ConfigError(
            f"--weights {unknown[0]}: there is no such task; known are "
            f"{', '.join(known) or 'none: the file has no lineage of ours'}."
        )
    inherited = sorted(set(weights) - set(learned.updates))
    if inherited:
        raise LineageError(_why_not_apart(inherited[0], learned, lineage))
    total = learned.rest
    for name, update in learned.updates.items():
        total = total + update.weighted(weights.get(name, 1.0))
    kept = Delta({name: entry for name, entry in total.items() if entry.norm() > 0})
    metadata = learned.derived_metadata(weights=dict(weights))
    metadata.pop("ss_lcp_blocks", None)
    return Learned(kept.as_adapter(), metadata, source=learned.source)


# ------------------------------------------------------------------------------------- LoRA files


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
        metadata = learned.derived_metadata(truncation=_describe_truncation(rank, overall, errors))
        metadata.pop("ss_lcp_blocks", None)
    if layout.startswith("kohya"):
        adapter = portable_adapter(adapter)
        metadata.update(size_header(adapter))
    with replacing(path) as temporary:
        write_lora(temporary, adapter, metadata, dtype, layout)
        check_lora(temporary, adapter, dtype)
    return Exported(path, len(adapter), path.stat().st_size, overall, errors)


def _describe_truncation(rank: int, overall: float, errors: Mapping[str, float]) -> object:
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
    with _replacing_folder(folder) as temporary:
        for prefix in PREFIXES:
            part = learned.adapter.restrict(n for n in learned.adapter if n.startswith(prefix))
            if part:
                file = temporary / prefix[:-1] / "adapter_model.safetensors"
                write_lora(file, part, learned.metadata, dtype, "peft")
                check_lora(file, part, dtype)
    return Exported(folder, len(learned.adapter), _size_of(folder))


def export_diff(learned: Learned, path: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Dense `.diff` keys under kohya's names, written one matrix at a time."""
    path, delta = Path(path), learned.delta
    names = {f"{kohya_name(module)}.diff": module for module in sorted(delta)}
    ordered = dict(sorted(names.items(), key=lambda item: item[0].encode()))
    layout = {
        key: (NAME_OF[dtype], _weight_shape(delta[module])) for key, module in ordered.items()
    }
    size = sum(e.shape[0] * e.shape[1] for e in delta.values()) * dtype.itemsize
    require_free_space(path.parent, size, f"the dense export {path.name}")
    with replacing(path) as temporary:
        metadata = dict(learned.metadata)
        with temporary.open("wb") as out:
            out.write(build_header(layout, metadata))
            for key, module in ordered.items():
                matrix = delta[module].dense().to(dtype).reshape(layout[key][1]).contiguous()
                out.write(raw_bytes(matrix))
        reader = TensorReader(temporary)
        for key, module in ordered.items():
            if not torch.equal(reader.read(key).flatten(1), delta[module].dense().to(dtype)):
                raise FileFormatError(f"{path.name}: {key} does not read back as it was written.")
    return Exported(path, len(delta), path.stat().st_size)


def _weight_shape(entry: Entry) -> tuple[int, ...]:
    if entry.kernel is None:
        return entry.shape
    height, width = entry.kernel
    return (entry.shape[0], entry.shape[1] // (height * width), height, width)


# ------------------------------------------------------------------------------------- checkpoints


def export_checkpoint(learned: Learned, base: str | Path, target: str | Path) -> Exported:
    """Fuse into a base: a single-file checkpoint gives one, a diffusers folder gives a folder.

    Names, types and metadata of the base stay; one tensor is in memory at a time.

    Raises:
        BaseModelError: the base does not have the modules that were learned.
    """
    base, target = Path(base), Path(target)
    if base.is_dir():
        return _export_folder(learned, base, target)
    header = read_header(base)
    delta = learned.checkpoint_delta()
    slots = checkpoint_slots(header, delta)
    require_free_space(target.parent, base.stat().st_size, f"the checkpoint {target.name}")
    with replacing(target) as temporary:
        fused = fuse_file(base, temporary, slots, delta)
        check_fused(base, temporary, slots, delta)
    size = target.stat().st_size
    return Exported(target, fused.modules, size, rounding_share=fused.rounding_share)


def _export_folder(learned: Learned, base: Path, target: Path) -> Exported:
    delta, fused, found = learned.checkpoint_delta(), Fused(), set[str]()
    require_free_space(target.parent, _size_of(base), f"the model folder {target.name}")
    with _replacing_folder(target) as temporary:
        for file in sorted(p for p in base.rglob("*") if p.is_file()):
            place = temporary / file.relative_to(base)
            place.parent.mkdir(parents=True, exist_ok=True)
            component = file.relative_to(base).parts[0]
            if component not in COMPONENTS or file.suffix != ".safetensors":
                shutil.copyfile(file, place)
                continue
            slots = component_slots(read_header(file), component, delta)
            fused = fused + fuse_file(file, place, slots, delta)
            check_fused(file, place, slots, delta)
            found |= {part.module for parts in slots.values() for part in parts}
        missing = sorted(set(delta) - found)
        if missing:
            raise BaseModelError(
                f"{base} lacks {few(missing)}, which the adapter changes (weights must be "
                ".safetensors)."
            )
    return Exported(target, len(found), _size_of(target), rounding_share=fused.rounding_share)


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the body is done.

    Raises:
        DiskError: `folder` exists, is not empty and no export of ours, or the file system failed.
    """
    ours = (folder / MARKER).is_file()  # an earlier export of ours may be replaced
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise DiskError(f"{folder} exists and is not empty; choose another name or remove it.")
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        write_json(temporary / MARKER, {"made_by": "lcp_plugin export"})
        for file in temporary.rglob("*"):
            sync(file)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        temporary.replace(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DiskError(
            f"{folder} could not be written ({error.strerror or error}); free some space or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def check_output(path: Path) -> None:
    """Raises ConfigError for a name that promises a pickle: what is written is safetensors."""
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise ConfigError(
            f"-o {path}: {path.suffix} is a pickle's name, and what is written is safetensors, "
            f"which readers refuse under it; use {path.with_suffix('.safetensors').name}."
        )


def target_of(form: Form, deliverable: Path, base: Path | None) -> Path:
    """Where a run puts a form, beside its deliverable: `objects_r64.safetensors`, ..."""
    stem = deliverable.with_suffix("").name
    if form.kind == "lora":
        name = f"{stem}_r{form.rank}.safetensors" if form.rank else deliverable.name
    elif form.kind == "peft" or (form.kind == "checkpoint" and base is not None and base.is_dir()):
        name = f"{stem}_{form.kind}"
    else:
        name = f"{stem}_{form.kind}.safetensors"
    return deliverable.with_name(name)


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
