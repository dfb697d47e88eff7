"""The forms an export can have, where each goes, and what is told of one that was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lcp_plugin.errors import ConfigError

FORMS = ("lora", "diff", "diffusers", "peft", "checkpoint")


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
            raise ConfigError(f"form {text!r}: use {', '.join(FORMS)}, or lora:RANK.")
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


def check_output(path: Path, sources: Iterable[Path] = (), is_folder: bool = False) -> None:
    """Raises ConfigError for a name that promises a pickle, since what is written is safetensors,
    for that of a file which is read, and would be lost, and for a folder where none is written.
    """
    if path.is_dir() and path.name and not is_folder:
        raise ConfigError(f"-o {path} is a folder; name a file in it: {path / 'lora.safetensors'}.")
    if path.is_file() and any(s.is_file() and s.samefile(path) for s in sources):
        raise ConfigError(f"-o {path} is a file that this reads; give the result another name.")
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
