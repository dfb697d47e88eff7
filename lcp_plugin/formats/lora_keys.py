"""Keys of LoRA files: which module a tensor belongs to, and which part of it it is.

    sgm        lora_unet_input_blocks_4_1_proj_in.lora_down.weight      (kohya: sd-scripts' default)
    blocks     lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight (kohya, other names)
    diffusers  unet.down_blocks.1.attentions.0.proj_in.lora_A.weight         (and older spellings)
    peft       base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight   (or .default.)

Another tool's names are a row of `_OTHER_TOOLS` or `_PARTS`; keys.py has the names of modules,
lycoris.py the parts of each kind of adapter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.keys import (
    Family,
    Layout,
    canonical,
    is_module,
    kohya_name,
    parse_kohya_name,
    prefix_of,
)
from lcp_plugin.formats.lycoris import PLAIN_PARTS


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
_PARTS.update({part: part for part in PLAIN_PARTS})
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
    if name.startswith(("lora_unet_", "diffusion_model.")):
        flat = re.sub(r"^(lora_unet_|diffusion_model\.)", "", name).replace(".", "_")
        name = f"lora_unet_{flat}"
    if name.startswith(("lora_unet_", "lora_te1_", "lora_te2_")):
        found_name = parse_kohya_name(name, layers_per_block)
        return Key(found_name[0], part, found_name[1]) if found_name else None
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


def embedding_of(key: str) -> str | None:
    """The name of the textual embedding that a key of OneTrainer's bundles holds a part of."""
    match = _EMBEDDING.match(key)
    return match[1] if match else None


def write_key(
    module: str,
    part: Literal["down", "up", "alpha", "diff_b"],
    layout: Layout,
    layers_per_block: int = 2,
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
        ending = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(part, part)
        return f"{kohya_name(module, layout, layers_per_block)}.{ending}"
    if part not in ("down", "up"):
        raise FileFormatError(f"the layout {layout} has no {part} tensors.")
    ending = {"down": "lora_A.weight", "up": "lora_B.weight"}[part]
    if layout == "diffusers":
        return f"{module}.{ending}"
    name = module[len(prefix) :]
    if prefix == "text_encoder.":  # transformers 5: CLIPTextModel has no `text_model.` any more
        name = name.removeprefix("text_model.")
    return f"base_model.model.{name}.{ending}"
