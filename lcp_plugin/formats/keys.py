"""Names of SDXL's modules: diffusers <-> SGM <-> kohya, by grammar, without a model.

Inside the package a module has diffusers' own dotted name under `unet.`, `text_encoder.` or
`text_encoder_2.`. Kohya's names are flattened, with SGM's names of blocks or diffusers':

    sgm        lora_unet_input_blocks_4_1_proj_in                 (sd-scripts' default)
    blocks     lora_unet_down_blocks_1_attentions_0_proj_in       (other tools)

Text encoders are `lora_te1_...` and `lora_te2_...` in both. A flattened name is read back by
looking up its shape, all numbers replaced by N, in the table of SDXL's module names: no guess which
underscore was a dot.

SGM numbers blocks in one row: with L = layers_per_block (2 for SDXL), resnet j of down block b is
input block b (L+1) + j + 1, its downsampler (b+1)(L+1); resnet j of up block b is output block
b (L+1) + j; position 0 within it is the resnet, 1 the attention, 2 the upsampler (sd-scripts,
library/sdxl_model_util.py make_unet_conversion_map; diffusers, loaders/lora_conversion_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Literal

from lcp_plugin.errors import FileFormatError

Layout = Literal["sgm", "blocks", "diffusers", "peft"]
Family = Literal["sgm", "blocks", "kohya", "diffusers", "peft"]  # kohya: either of the first two
PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")
_KOHYA_TEXT = {"text_encoder.": "lora_te1_", "text_encoder_2.": "lora_te2_"}

# SGM's words for what is inside a resnet, and for what is outside all blocks
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_BACK = {value.replace(".", "_"): key for key, value in _SGM_RESNET.items()}
_OUTSIDE_BACK = {value.replace(".", "_"): key for key, value in _SGM_OUTSIDE.items()}


# ------------------------------------------------------------------------------ the grammar


def _inside_attention() -> Iterator[str]:
    """Names below `attentions.N.` and, with the first word cut, below `transformer_blocks.N.`."""
    yield from ("norm", "proj_in", "proj_out")
    inner = [f"attn{i}.{p}" for i, p in product((1, 2), ("to_q", "to_k", "to_v", "to_out.0"))]
    inner += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    yield from (f"transformer_blocks.N.{name}" for name in inner)


def _unet_names() -> Iterator[str]:
    yield from _SGM_OUTSIDE
    for block in ("down_blocks.N", "mid_block", "up_blocks.N"):
        yield from (f"{block}.resnets.N.{name}" for name in _SGM_RESNET)
        yield from (f"{block}.attentions.N.{name}" for name in _inside_attention())
    yield "down_blocks.N.downsamplers.0.conv"
    yield "up_blocks.N.upsamplers.0.conv"


def _text_names() -> Iterator[str]:
    layer = "text_model.encoder.layers.N"
    yield from (f"{layer}.self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
    yield from (f"{layer}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"))
    yield "text_model.final_layer_norm"
    yield from (f"text_model.embeddings.{p}_embedding" for p in ("token", "position"))
    yield "text_projection"


_DOTTED_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FLAT_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")


def _shape_of(name: str) -> str:
    return _DOTTED_NUMBER.sub("N", name)


_DOTTED = {
    "unet": {_shape_of(name): name for name in _unet_names()},
    "text": {_shape_of(name): name for name in _text_names()},
    "attention": {_shape_of(f"x.{name}"): f"x.{name}" for name in _inside_attention()},
}
_FLAT = {
    kind: {_FLAT_NUMBER.sub("N", name.replace(".", "_")): name for name in table.values()}
    for kind, table in _DOTTED.items()
}
_FLAT_OUTSIDE = {name.replace(".", "_"): name for name in _SGM_OUTSIDE}  # linear_1: no N there


def _unflatten(kind: str, flat: str) -> str | None:
    """The dotted name whose flattened form `flat` is; None if SDXL has none such."""
    if kind == "unet" and flat in _FLAT_OUTSIDE:
        return _FLAT_OUTSIDE[flat]
    template = _FLAT[kind].get(_FLAT_NUMBER.sub("N", flat))
    if template is None:
        return None
    numbers = iter(_FLAT_NUMBER.findall(flat))
    dotted = re.sub(r"(?<=\.)(N|\d+)(?=\.|$)", lambda _: next(numbers), template)
    return dotted if _fits(dotted, template) else None


def _fits(dotted: str, template: str) -> bool:
    """Whether the template's literal numbers (to_out.0, ff.net.2) are met."""
    pairs = zip(dotted.split("."), template.split("."), strict=True)
    return all(wanted in ("N", got) for got, wanted in pairs)


@lru_cache(maxsize=8192)
def is_module(name: str) -> bool:
    """Whether `name` is a module of SDXL in our spelling, e.g. `unet.conv_in`."""
    prefix = prefix_of(name)
    if prefix is None:
        return False
    table = _DOTTED["unet" if prefix == "unet." else "text"]
    rest = name[len(prefix) :]
    template = table.get(_shape_of(rest))
    return template is not None and _fits(rest, template)


def prefix_of(name: str) -> str | None:
    """`unet.`, `text_encoder.` or `text_encoder_2.`; None for anything else."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)


def canonical(name: str) -> str:
    """Our spelling of a live module's name: transformers 5 drops CLIPTextModel's `text_model.`."""
    return re.sub(
        r"^(text_encoder(?:_2)?\.)(?=encoder\.|embeddings\.|final)", r"\1text_model.", name
    )


def kernel_of(name: str) -> tuple[int, int] | None:
    """Kernel of a convolution of SDXL by its name; None for a linear layer."""
    last = name.rsplit(".", 1)[-1]
    if last == "conv_shortcut":
        return (1, 1)
    return (3, 3) if last in ("conv", "conv1", "conv2", "conv_in", "conv_out") else None


# ------------------------------------------------------------------------- diffusers <-> SGM


def to_sgm(name: str, layers_per_block: int = 2) -> str:
    """A UNet module's dotted name in SGM's words; both without prefix.

    Raises:
        FileFormatError: not a module of an SDXL UNet.
    """
    if name in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[name]
    match = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", name)
    if match is None or not is_module(f"unet.{name}"):
        raise FileFormatError(f"{name} is not a module of an SDXL UNet.")
    side, block, kind, index, rest = match.groups()
    stride, b, j = layers_per_block + 1, int(block or 0), int(index)
    inner = _SGM_RESNET[rest] if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * j if kind == 'resnets' else 1}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(b + 1) * stride}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(b + 1) * stride - 1}.2.conv"
    row = (
        f"input_blocks.{b * stride + j + 1}"
        if side == "down"
        else f"output_blocks.{b * stride + j}"
    )
    return f"{row}.{0 if kind == 'resnets' else 1}.{inner}"


def from_sgm(flat: str, layers_per_block: int = 2) -> str | None:
    """diffusers' name of a flattened SGM name (`input_blocks_4_1_proj_in`); None without one."""
    if flat in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[flat]
    middle = re.fullmatch(r"middle_block_([012])_(.+)", flat)
    if middle:
        place = int(middle[1])
        start = f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[place]}"
        return _sgm_inside(start, "attention" if place == 1 else "resnet", middle[2])
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", flat)
    if match is None:
        return None
    row, place, rest = int(match[2]), int(match[3]), match[4]
    stride = layers_per_block + 1
    if match[1] == "input":
        b, j = divmod(row - 1, stride)
        if rest == "op" and place == 0 and j == layers_per_block:
            return f"down_blocks.{b}.downsamplers.0.conv"
        side = "down"
        if row == 0 or j == layers_per_block:
            return None
    else:
        side, (b, j) = "up", divmod(row, stride)
        if rest == "conv" and place in (1, 2) and j == layers_per_block:
            return f"up_blocks.{b}.upsamplers.0.conv"
    if place == 2:
        return None
    kind = ("resnet", "attention")[place]
    return _sgm_inside(f"{side}_blocks.{b}.{kind}s.{j}", kind, rest)


def _sgm_inside(start: str, kind: str, rest: str) -> str | None:
    if kind == "resnet":
        inner = _RESNET_BACK.get(rest)
        return f"{start}.{inner}" if inner else None
    dotted = _unflatten("attention", f"x_{rest}")
    return f"{start}{dotted[1:]}" if dotted else None


# ------------------------------------------------------------------------ kohya's flat names


@lru_cache(maxsize=8192)
def kohya_name(module: str, layout: Layout = "sgm", layers_per_block: int = 2) -> str:
    """kohya's flattened name of a module: `lora_unet_...`, `lora_te1_...`, `lora_te2_...`."""
    prefix = prefix_of(module)
    if prefix is None:
        raise FileFormatError(f"{module} is not a module of SDXL; it has no name in LoRA files.")
    rest = module[len(prefix) :]
    if prefix != "unet.":
        return _KOHYA_TEXT[prefix] + rest.replace(".", "_")
    name = to_sgm(rest, layers_per_block) if layout == "sgm" else rest
    return "lora_unet_" + name.replace(".", "_")


def parse_kohya_name(name: str, layers_per_block: int = 2) -> tuple[str, Family] | None:
    """The module that kohya's flattened name means, and whose names of blocks it has.

    None if SDXL has no such module.
    """
    for prefix, kohya in _KOHYA_TEXT.items():
        if name.startswith(kohya):
            dotted = _unflatten("text", name[len(kohya) :])
            return (prefix + dotted, "kohya") if dotted else None
    flat = name.removeprefix("lora_unet_")
    dotted = from_sgm(flat, layers_per_block)
    if dotted:
        return f"unet.{dotted}", "sgm"
    dotted = _unflatten("unet", flat)
    family: Family = "kohya" if dotted in _SGM_OUTSIDE else "blocks"
    return (f"unet.{dotted}", family) if dotted else None


# ------------------------------------------------------------------- single-file checkpoints

_OPEN_CLIP = {  # text encoder 2 in an SDXL checkpoint: OpenCLIP's words, q, k, v in one matrix
    "self_attn.q_proj": ("attn.in_proj_weight", 0),
    "self_attn.k_proj": ("attn.in_proj_weight", 1),
    "self_attn.v_proj": ("attn.in_proj_weight", 2),
    "self_attn.out_proj": ("attn.out_proj.weight", None),
    "mlp.fc1": ("mlp.c_fc.weight", None),
    "mlp.fc2": ("mlp.c_proj.weight", None),
}


def checkpoint_slot(module: str, layers_per_block: int = 2) -> tuple[str, int | None]:
    """Where a module's weight lies in a single-file SDXL checkpoint.

    Returns:
        the tensor's name, and which third of its rows (None: all of it).
    Raises:
        FileFormatError: a module that an SDXL checkpoint does not have as one matrix.
    """
    prefix = prefix_of(module) or ""
    rest = module[len(prefix) :]
    if prefix == "unet.":
        return f"model.diffusion_model.{to_sgm(rest, layers_per_block)}.weight", None
    if prefix == "text_encoder." and rest != "text_projection":
        return f"conditioner.embedders.0.transformer.{rest}.weight", None
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", rest)
    if prefix == "text_encoder_2." and match and match[2] in _OPEN_CLIP:
        name, third = _OPEN_CLIP[match[2]]
        return f"conditioner.embedders.1.model.transformer.resblocks.{match[1]}.{name}", third
    raise FileFormatError(f"{module} has no matrix of its own in a single-file checkpoint.")
