"""Anyone's SDXL LoRA file <-> Adapter and Delta.

Read: kohya (SGM and diffusers block names), diffusers (new and old spellings), peft (a file or a
folder with adapter_config.json), LyCORIS LoRA / LoHa / LoKr / full `diff`, and `diff_b` of biases.
What is a plain LoRA comes back as factors with the file's own alpha, the rest as a dense delta
(lycoris.py has the formulas). A key that is not understood, a module that lacks a half, or two
naming schemes in one file are errors: nothing is dropped silently.

Written: the same names, factors as they are.

One file for one change: another kind of adapter is a row of lycoris.py, another tool's names are a
row of lora_keys.py, another option of peft's configuration is peft_config.py's.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, Factors, is_finite
from lcp_plugin.biases import Biases, Change
from lcp_plugin.delta import Delta
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.formats.disk import write_json
from lcp_plugin.formats.families import check_family
from lcp_plugin.formats.identity import write_hashed
from lcp_plugin.formats.keys import PREFIXES, Layout
from lcp_plugin.formats.lora_keys import embedding_of, parse_key, write_key
from lcp_plugin.formats.lycoris import (
    build_dense,
    build_factors,
    read_bias,
    refuse_norm,
    unread_kind_of,
)
from lcp_plugin.formats.peft_config import (
    DIFFUSERS_METADATA,
    PEFT_FILE,
    PeftConfigs,
    describe_models,
    only_model,
    peft_config,
)
from lcp_plugin.formats.precisions import check_rounded
from lcp_plugin.formats.tensors import (
    in_file_order,
    layout_of,
    read_header,
    read_tensors,
    write_tensors,
)
from lcp_plugin.telling.wording import agree, counted, join_names

log = logging.getLogger(__name__)
LAYOUTS: dict[str, Layout] = {
    "kohya": "sgm",
    "kohya_blocks": "blocks",
    "diffusers": "diffusers",
    "peft": "peft",
}
FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")
BIAS_READERS = (  # of what a file with diff_b beside LoRA keys does; docs/readers.md has the table
    "changes biases (diff_b): ComfyUI and Forge read them beside a LoRA; A1111 and sd-scripts' "
    "networks.lora leave them out, diffusers refuses the file. A checkpoint export holds all of it."
)
FactorPart = Literal["down", "up", "alpha", "diff_b"]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds. Its change of the base is `delta + Delta.of(adapter)`, and biases."""

    adapter: Adapter  # plain LoRA modules
    delta: Delta  # modules of other kinds, dense
    metadata: dict[str, str]
    format: str  # kohya | kohya_blocks | diffusers | peft
    biases: Biases = field(default_factory=Biases)  # `diff_b`

    @property
    def total(self) -> Delta:
        """All modules as one delta."""
        return self.delta + Delta.of(self.adapter)

    @property
    def change(self) -> Change:
        """The total, and the changes of biases."""
        return Change(self.total, self.biases)


# ------------------------------------------------------------------------------------- reading


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA of any kind named above; a folder is searched for peft's or diffusers' file.

    Raises:
        FileFormatError: damaged, DoRA, unknown or mixed keys, shapes that do not fit.
        NumericError: NaN or infinity.
    """
    path = find_lora(path)
    return lora_from_tensors(read_tensors(path), read_header(path).metadata, path)


def lora_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> LoraFile:
    """What `read_lora` reads, of tensors in memory; `path` names them in messages."""
    configs = PeftConfigs.of(path, metadata)
    grouped, family = _group_keys(path, tensors, configs.only_prefix(path))
    weights = {
        module: rest
        for module, parts in grouped.items()
        if (rest := {part: tensor for part, tensor in parts.items() if part != "diff_b"})
    }
    try:
        for module, parts in grouped.items():
            refuse_norm(module, parts)
        factors = {
            module: build_factors(module, parts, configs.alpha_of)
            for module, parts in weights.items()
            if "down" in parts or "up" in parts
        }
        dense = {
            module: build_dense(module, parts, configs.scale_of)
            for module, parts in weights.items()
            if module not in factors
        }
        shapes = {name: f.shape for name, f in factors.items()}
        shapes |= {name: entry.shape for name, entry in dense.items()}
        outputs = {name: shape[0] for name, shape in shapes.items()}
        biases = Biases(
            {
                module: read_bias(module, parts, outputs.get(module))
                for module, parts in grouped.items()
                if "diff_b" in parts
            }
        )
        adapter, delta = Adapter(factors), Delta(dense)
        for part in (adapter, delta, biases):
            part.check_finite()
    except (FileFormatError, NumericError) as error:
        raise type(error)(f"{path}: {error}") from error
    check_family(shapes, metadata, path)
    return LoraFile(adapter, delta, dict(metadata), family, biases)


def find_lora(path: str | Path) -> Path:
    """`path` itself, or the LoRA file in the folder `path`. Raises FileFormatError."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    found = found or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise FileFormatError(_which_file(path, [file.name for file in found]))


def _which_file(folder: Path, found: Sequence[str]) -> str:
    """Why a folder is not one LoRA, and which file may be meant."""
    if found:
        return f"{folder} holds {join_names(found)}; name the one that is meant."
    beside = folder.with_name(f"{folder.name}.safetensors")  # a run's deliverable
    if beside.is_file():
        return f"{folder} holds no LoRA file itself; {beside} stands beside it: name that."
    wanted = ", ".join(FOLDER_FILES)
    return f"{folder} holds no LoRA file ({wanted} or another); name the file itself."


def _group_keys(
    path: Path, tensors: Mapping[str, Tensor], peft_prefix: str | None
) -> tuple[dict[str, dict[str, Tensor]], str]:
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    by_family: dict[str, list[str]] = defaultdict(list)
    unknown: list[str] = []
    embeddings = {n for name in tensors if (n := embedding_of(name))}
    if embeddings:
        log.warning(
            "%s: the embeddings %s bundled with the LoRA are left out; their words do nothing "
            "without a file of their own.",
            *(path, _few(embeddings)),
        )
    for name, tensor in tensors.items():
        if embedding_of(name):
            continue
        key = parse_key(name)
        if key is None:
            unknown.append(name)
            continue
        module = key.module
        if key.family == "peft" and peft_prefix and module.startswith("text_encoder."):
            module = peft_prefix + module.removeprefix("text_encoder.")
        if key.part in grouped[module]:
            raise FileFormatError(f"{path} holds {key.part} of {module} twice, e.g. as {name}.")
        by_family[key.family].append(name)
        grouped[module][key.part] = tensor
    if unknown:
        kinds = sorted({kind for key in unknown if (kind := unread_kind_of(key))})
        if kinds:
            raise FileFormatError(
                f"{path} holds {' and '.join(kinds)} (e.g. {_few(unknown, 1)}): an SDXL adapter of "
                "a kind that is not read; LoRA, LoHa, LoKr and full are. Fuse it into a checkpoint "
                "with the tool that made it."
            )
        raise FileFormatError(f"{path} holds keys that no SDXL LoRA has: {_few(unknown)}.")
    if not grouped:
        raise FileFormatError(f"{path} holds no tensors; it is no LoRA.")
    return dict(grouped), _one_family(path, by_family)


def _one_family(path: Path, by_family: Mapping[str, list[str]]) -> str:
    named = {"sgm": "kohya", "blocks": "kohya_blocks"}
    definite = {f: keys for f, keys in by_family.items() if f != "kohya"}
    if len(definite) > 1 or ("kohya" in by_family and definite.keys() & {"diffusers", "peft"}):
        examples = "; ".join(f"{family} e.g. {_few(k, 1)}" for family, k in by_family.items())
        raise FileFormatError(
            f"{path} mixes naming schemes, of which readers silently drop one: {examples}. Save it "
            "with one."
        )
    family = next(iter(definite), "sgm")
    return named.get(family, family)


def _few(names: Iterable[str], count: int = 5) -> str:
    names = [n if len(n) <= 90 else n[:87] + "..." for n in names]
    shown = ", ".join(n if n.isprintable() else repr(n) for n in sorted(names)[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


# ------------------------------------------------------------------------------------- writing


def write_lora(
    path: str | Path,
    adapter: Adapter,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "kohya",
    biases: Biases | None = None,
) -> dict[str, str]:
    """Write factors as they are: rank, alpha and kernel of every module survive a round trip.

    Factors are stored in `dtype`, alphas exactly (a rank of 650 is no bf16 number). In the kohya
    layouts the metadata gains `sshs_model_hash` and `sshs_legacy_hash`; diffusers and peft
    have no alpha tensors, so there alphas go where their readers look for them: the header's
    `lora_adapter_metadata`, and adapter_config.json beside a file named adapter_model.safetensors.

    Args:
        layout: kohya | kohya_blocks | diffusers | peft (one model: UNet or one text encoder).
    Returns:
        the metadata as written.
    Raises:
        FileFormatError: an unknown layout; one that cannot hold biases; peft with several models.
        NumericError: NaN.
        DiskError: the write failed.
    """
    if layout not in LAYOUTS:
        raise FileFormatError(f"layout '{layout}' is not known; use one of {', '.join(LAYOUTS)}.")
    written = dict(metadata or {})
    if layout.startswith("kohya"):
        parts = {**_parts_by_key(adapter, layout), **_biases_by_key(biases or Biases(), layout)}
        return _write_rounded(path, parts, written, dtype)
    refuse_biases(biases or Biases(), f"a file in the layout {layout}")
    adapter.check_finite()
    written[DIFFUSERS_METADATA] = json.dumps(describe_models(adapter), sort_keys=True)
    write_tensors(path, lora_tensors(adapter, dtype, layout), written)
    if layout == "peft" and Path(path).name == PEFT_FILE:
        write_json(Path(path).parent / "adapter_config.json", peft_config(adapter))
    return written


def _write_rounded(
    path: str | Path,
    parts: Mapping[str, tuple[str, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> dict[str, str]:
    """One pass over key -> (module, tensor): each is checked, rounded, hashed and written."""
    kinds = {k: t.dtype if k.endswith(".alpha") else dtype for k, (_, t) in parts.items()}
    shapes = {key: tensor.to("meta", kinds[key]) for key, (_, tensor) in parts.items()}
    buffer = torch.empty(max((t.numel() for _, t in parts.values()), default=0), dtype=dtype)

    def make(key: str) -> Tensor:
        module, tensor = parts[key]
        if tensor.dim() == 0:  # an alpha, as it is
            return tensor
        if not is_finite(tensor):
            raise NumericError(
                f"the adapter of {module} holds NaN or infinity; it is not used or saved."
            )
        if dtype is tensor.dtype:
            return tensor
        rounded = buffer[: tensor.numel()].copy_(tensor.view(-1))
        return check_rounded(rounded, f"the adapter of {module}")

    return write_hashed(path, in_file_order(layout_of(shapes)), make, metadata)


def _parts_by_key(adapter: Adapter, layout: str) -> dict[str, tuple[str, Tensor]]:
    return {
        write_key(module, part, LAYOUTS[layout]): (module, tensor)
        for module, factors in adapter.items()
        for part, tensor in _parts_of(factors, with_alpha=True).items()
    }


def refuse_biases(biases: Biases, holder: str) -> None:
    """Raises FileFormatError where biases change: `holder` is a form that has no place for them."""
    if not biases:
        return
    verb = agree(len(biases), "changes", "change")
    raise FileFormatError(
        f"{counted(len(biases), 'bias')} {verb} (diff_b), which {holder} cannot hold; export a "
        "lora, diff or checkpoint."
    )


def _biases_by_key(biases: Biases, layout: str) -> dict[str, tuple[str, Tensor]]:
    return {
        write_key(module, "diff_b", LAYOUTS[layout]): (module, change)
        for module, change in biases.items()
    }


def portable_adapter(adapter: Adapter) -> Adapter:
    """The same update with one alpha for all modules of a model: what a deliverable holds.

    diffusers (to 0.42 at least) takes the most common alpha of a kohya file for all attention and
    text-encoder layers; with different alphas its images are wrong, without an error. So B_i takes
    what differs: B_i' = B_i alpha_i / alpha', exact where that is a power of two, as for the dense
    ranks 640 and 1280 of SDXL. Equal alphas stay untouched.
    """
    changed: dict[str, Factors] = {}
    for prefix in PREFIXES:
        part = {name: f for name, f in adapter.items() if name.startswith(prefix)}
        if len({f.alpha for f in part.values()}) < 2:
            changed.update(part)
            continue
        alpha = float(Counter(f.rank for f in part.values()).most_common(1)[0][0])
        for name, f in part.items():
            up = f.up if f.alpha == alpha else f.up * (f.alpha / alpha)
            changed[name] = Factors(f.down, up, alpha, f.kernel)
    return Adapter(changed)


def lora_tensors(
    adapter: Adapter, dtype: torch.dtype = torch.float32, layout: str = "kohya"
) -> dict[str, Tensor]:
    """The tensors of a LoRA file by key."""
    naming = LAYOUTS[layout]
    if layout == "peft":
        only_model(adapter)
    return {
        write_key(module, part, naming): tensor
        if part == "alpha"
        else check_rounded(tensor.to(dtype), f"the adapter of {module}")
        for module, factors in adapter.items()
        for part, tensor in _parts_of(factors, layout.startswith("kohya")).items()
    }


def _parts_of(factors: Factors, with_alpha: bool) -> dict[FactorPart, Tensor]:
    """down, up and alpha as files have them: in fp32, of a convolution in four dimensions."""
    down, up = factors.down, factors.up
    if factors.kernel:
        down = down.reshape(factors.rank, -1, *factors.kernel)
        up = up[:, :, None, None]
    parts: dict[FactorPart, Tensor] = {"down": down.contiguous(), "up": up.contiguous()}
    if with_alpha:
        parts["alpha"] = _alpha_tensor(factors.alpha)
    return parts


def _alpha_tensor(alpha: float) -> Tensor:
    """fp32, as kohya has it; fp64 where that would round."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
