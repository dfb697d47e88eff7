"""Names of modules and LoRA keys: kohya <-> diffusers <-> peft, by grammar, without a model.

Inside the package a module has diffusers' own dotted name under `unet.`, `text_encoder.` or
`text_encoder_2.`. The layouts that files use for the same module:

    sgm        lora_unet_input_blocks_4_1_proj_in.lora_down.weight      (kohya: sd-scripts' default)
    blocks     lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight (kohya, other names)
    diffusers  unet.down_blocks.1.attentions.0.proj_in.lora_A.weight         (and older spellings)
    peft       base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight   (or .default.)

Text encoders are `lora_te1_...` and `lora_te2_...` in both kohya layouts. Kohya's flattened names
are read back by looking up their shape, all numbers replaced by N, in the table of SDXL's module
names: no guess which underscore was a dot.

SGM numbers blocks in one row: with L = layers_per_block (2 for SDXL), resnet j of down block b is
input block b (L+1) + j + 1, its downsampler (b+1)(L+1); resnet j of up block b is output block
b (L+1) + j; position 0 within it is the resnet, 1 the attention, 2 the upsampler (sd-scripts,
library/sdxl_model_util.py make_unet_conversion_map; diffusers, loaders/lora_conversion_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
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
    """The diffusers name of a flattened SGM name such as `input_blocks_4_1_proj_in`; None if there
    is none.
    """
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


# ------------------------------------------------------------------------------- whole keys


@dataclass(frozen=True)
class Key:
    """A tensor's name in a LoRA file, understood."""

    module: str  # our spelling
    part: str  # down, up, mid, alpha, diff, hada_w1_a, lokr_w1, dora_scale, ...
    family: Family


_PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
}
_PLAIN_PARTS = (  # LyCORIS and kohya: written as they are called
    *("alpha", "dora_scale", "diff", "diff_b", "scalar", "hada_t1", "hada_t2", "lokr_t2"),
    *(f"hada_w{i}_{s}" for i, s in product((1, 2), "ab")),
    *("lokr_w1", "lokr_w2", *(f"lokr_w{i}_{s}" for i, s in product((1, 2), "ab"))),
)
_PARTS.update({part: part for part in _PLAIN_PARTS})
_ENDINGS = sorted(_PARTS, key=len, reverse=True)
_ADAPTER_NAME = re.compile(r"\.lora_(A|B)\.[^.]+\.weight$")  # peft: lora_A.default.weight
_OLD_PROCESSOR = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")


def parse_key(key: str, layers_per_block: int = 2) -> Key | None:
    """What a key of a LoRA file means; None if it is none that we know."""
    old = _OLD_PROCESSOR.search(key)
    if old:
        return _parse_old(key[: old.start()], old[1], old[2])
    key = _ADAPTER_NAME.sub(r".lora_\1.weight", key)
    for ending in _ENDINGS:
        if key.endswith("." + ending):
            return _parse_module(key[: -len(ending) - 1], _PARTS[ending], layers_per_block)
    return None


def _parse_old(start: str, projection: str, part: str) -> Key | None:
    """diffusers before peft: `...attn1.processor.to_out_lora.down`, `...self_attn.to_q_lora.up`."""
    if start.startswith("unet."):
        module = f"{start}.to_{projection}" + (".0" if projection == "out" else "")
    else:
        module = f"{start}.{projection}_proj"
    module = canonical(module)
    return Key(module, part, "diffusers") if is_module(module) else None


# Beginnings that other tools write, in the words of those that are parsed: OneTrainer's OMI names,
# ComfyUI's, and SimpleTuner's LyCORIS
_OTHER_TOOLS = (
    (re.compile(r"^(?:text_encoders\.)?clip_l\.(?:transformer\.)?"), "text_encoder."),
    (re.compile(r"^(?:text_encoders\.)?clip_g\.(?:transformer\.)?"), "text_encoder_2."),
    (re.compile(r"^lycoris_(?!te|text)"), "lora_unet_"),
    (re.compile(r"^unet\.(?=(?:in|out)put_blocks\.|middle_block\.)"), "diffusion_model."),
    (re.compile(r"^unet\.(?=time_embed\.|label_emb\.|out\.)"), "diffusion_model."),
)


def _parse_module(name: str, part: str, layers_per_block: int) -> Key | None:
    for beginning, ours in _OTHER_TOOLS:
        name, found = beginning.subn(ours, name)
        if found and ours.startswith("text_encoder"):
            module = canonical(name)
            return Key(module, part, "kohya") if is_module(module) else None
    for prefix, kohya in _KOHYA_TEXT.items():
        if name.startswith(kohya):
            dotted = _unflatten("text", name[len(kohya) :])
            return Key(prefix + dotted, part, "kohya") if dotted else None
    if name.startswith(("lora_unet_", "diffusion_model.")):
        flat = re.sub(r"^(lora_unet_|diffusion_model\.)", "", name).replace(".", "_")
        dotted = from_sgm(flat, layers_per_block)
        if dotted:
            return Key(f"unet.{dotted}", part, "sgm")
        dotted = _unflatten("unet", flat)
        family: Family = "kohya" if dotted in _SGM_OUTSIDE else "blocks"
        return Key(f"unet.{dotted}", part, family) if dotted else None
    if name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
        if prefix_of(name) is None:
            text = name.startswith(("text_model.", "encoder.", "text_projection"))
            name = ("text_encoder." if text else "unet.") + name
        name = canonical(name)
        return Key(name, part, "peft") if is_module(name) else None
    name = canonical(name)
    return Key(name, part, "diffusers") if is_module(name) else None


_EMBEDDING = re.compile(r"^bundle_emb\.(.+)\.(?:clip_[lg](?:_out)?|[^.]+)$")
_KINDS = {  # adapters of SDXL that are not read, by the ends of their keys
    "IA3": re.compile(r"\.(on_input|ia3_l(\.weight)?)$|^lora_\w+\.weight$"),
    "OFT or BOFT": re.compile(r"\.(oft_\w+|boft_\w+)(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12](\.weight)?$"),
    "a change of norms": re.compile(r"\.[wb]_norm$"),
}


def embedding_of(key: str) -> str | None:
    """The name of the textual embedding that a key of OneTrainer's bundles holds a part of."""
    match = _EMBEDDING.match(key)
    return match[1] if match else None


def kind_of(key: str) -> str | None:
    """The kind of SDXL adapter that a key belongs to, of those that are known and not read."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(key)), None)


def canonical(name: str) -> str:
    """Our spelling of a live module's name: transformers 5 drops CLIPTextModel's `text_model.`."""
    return re.sub(
        r"^(text_encoder(?:_2)?\.)(?=encoder\.|embeddings\.|final)", r"\1text_model.", name
    )


def write_key(
    module: str, part: Literal["down", "up", "alpha"], layout: Layout, layers_per_block: int = 2
) -> str:
    """The key of a module's factor in a layout.

    peft files hold one model each, so a UNet's and a text encoder's keys look alike there; alphas
    live in its configuration, as in diffusers' layout.

    Raises:
        FileFormatError: not a module of SDXL, or an alpha in a layout without one.
    """
    prefix = prefix_of(module)
    if prefix is None or not is_module(module):
        raise FileFormatError(f"{module} is not a module of SDXL; it has no name in LoRA files.")
    if layout in ("sgm", "blocks"):
        ending = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}[part]
        return f"{kohya_name(module, layout, layers_per_block)}.{ending}"
    if part == "alpha":
        raise FileFormatError(f"the layout {layout} has no alpha tensors.")
    ending = {"down": "lora_A.weight", "up": "lora_B.weight"}[part]
    if layout == "diffusers":
        return f"{module}.{ending}"
    name = module[len(prefix) :]
    if prefix == "text_encoder.":  # transformers 5: CLIPTextModel has no `text_model.` any more
        name = name.removeprefix("text_model.")
    return f"base_model.model.{name}.{ending}"


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
