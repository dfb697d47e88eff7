"""What was learned, fused into a base: a single-file SDXL checkpoint, or a diffusers folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from lcp_plugin.delivery.forms import Exported
from lcp_plugin.delivery.fusing import (
    Fused,
    Place,
    check_fused,
    checkpoint_slots,
    component_slots,
    few,
    fuse_file,
)
from lcp_plugin.delivery.learned import Learned
from lcp_plugin.delivery.whole_folder import replacing_folder, size_of
from lcp_plugin.errors import BaseModelError
from lcp_plugin.formats.disk import replacing, require_free_space
from lcp_plugin.formats.tensors import read_header

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


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
    change = learned.checkpoint_change()
    slots = checkpoint_slots(header, change)
    require_free_space(target.parent, base.stat().st_size, f"the checkpoint {target.name}")
    with replacing(target) as temporary:
        fused = fuse_file(base, temporary, slots, change)
        check_fused(base, temporary, slots, change)
    size = target.stat().st_size
    return Exported(target, fused.modules, size, rounding_share=fused.rounding_share)


def _export_folder(learned: Learned, base: Path, target: Path) -> Exported:
    change, fused, found = learned.checkpoint_change(), Fused(), set[Place]()
    require_free_space(target.parent, size_of(base), f"the model folder {target.name}")
    with replacing_folder(target) as temporary:
        for file in sorted(p for p in base.rglob("*") if p.is_file()):
            copy = temporary / file.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            component = file.relative_to(base).parts[0]
            if component not in COMPONENTS or file.suffix != ".safetensors":
                shutil.copyfile(file, copy)
                continue
            slots = component_slots(read_header(file), component, change)
            fused = fused + fuse_file(file, copy, slots, change)
            check_fused(file, copy, slots, change)
            found |= {place for places in slots.values() for place in places}
        wanted = {Place(n): n for n in change.delta}
        wanted |= {Place(n, of_bias=True): f"the bias of {n}" for n in change.biases}
        missing = sorted(words for place, words in wanted.items() if place not in found)
        if missing:
            raise BaseModelError(
                f"{base} lacks {few(missing)}, which the adapter changes "
                "(weights must be .safetensors)."
            )
    modules = len({place.module for place in found})
    return Exported(target, modules, size_of(target), rounding_share=fused.rounding_share)
