"""Whether a LoRA's modules can be SDXL's: by block numbers, by widths, by what its header says.

    SDXL       3 levels of 320, 640, 1280 channels, text of 2048
    SD 1, 2    4 levels of 320, 640, 1280, 1280 channels, text of 768 or 1024

A small base of SDXL's kind has other widths, so a width alone is no fault: what is refused is a
block that no model of three levels has, a width that SD 1 or 2 has at this place and SDXL has not,
and a header that names another model where the tensors do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lcp_plugin.errors import FileFormatError

_DOWN, _UP = (320, 640, 1280), (1280, 640, 320)  # SDXL's channels by block
_OLD_DOWN, _OLD_UP = (320, 640, 1280, 1280), (1280, 1280, 640, 320)  # those of SD 1 and 2
_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
_OTHER = re.compile(r"sd[_-]?v?[123](?!\d)|stable-diffusion-(v?[123])|flux|refiner|hunyuan", re.I)


def check_family(
    shapes: Mapping[str, tuple[int, int]], metadata: Mapping[str, str], path: object
) -> None:
    """Raises FileFormatError for a LoRA of another model than SDXL; `shapes` are (out, in)."""
    for name, shape in shapes.items():
        words = _impossible(name) or _other_width(name, shape)
        if words:
            raise FileFormatError(f"{path} is no SDXL LoRA: {name} {words}.")
    if any(_text_width(n) and s[1] == 2048 for n, s in shapes.items()):
        return
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "")
        if _OTHER.search(said) and ("xl" not in said.lower() or "refiner" in said.lower()):
            raise FileFormatError(
                f"{path} says that it was made for {said[:60]} ({key}); an SDXL LoRA is wanted."
            )


def _impossible(name: str) -> str:
    match = _BLOCK.match(name)
    if match is None:
        return ""
    side, block, _, index = match.groups()
    if int(block) > 2 or int(index) > (1 if side == "down" else 2):
        return "is a block that SDXL does not have"
    return ""


def _text_width(name: str) -> bool:
    return name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v"))


def _other_width(name: str, shape: tuple[int, int]) -> str:
    """What is wrong with an attention's width, if SD 1 or 2 has it there and SDXL has not."""
    if _text_width(name) and shape[1] in (768, 1024):
        return f"is {shape}: text of {shape[1]} is SD {1 if shape[1] == 768 else 2}'s, SDXL's 2048"
    match = _BLOCK.match(name)
    if match is None or match[3] != "attentions" or ".ff." in name:
        return ""
    side, block = match[1], int(match[2])
    ours = (_DOWN if side == "down" else _UP)[block]
    theirs = (_OLD_DOWN if side == "down" else _OLD_UP)[block]
    if shape[0] == theirs and (theirs != ours or (side, block) == ("down", 0)):
        return f"is {shape}: SD 1 or 2 has that there, SDXL has not"
    return ""
