"""Whether a folder or a file is a whole SDXL base, by names, configs and headers alone.

A run, its dry run and an export ask here, so that none of them starts on what cannot be loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcp_plugin.errors import BaseModelError
from lcp_plugin.formats.tensors import read_header

REFINED_KEYS = ("conditioner.embedders.1.model.", "conditioner.embedders.0.transformer.")
ENTRY_KEY = "model.diffusion_model.input_blocks.0.0.weight"  # (channels out, channels in, 3, 3)
TOKENIZER_FILES = ("vocab.json", "merges.txt")
WEIGHED = ("unet", "vae", "text_encoder", "text_encoder_2")  # folders that hold weights
VARIANTS = ("fp16", "bf16")
CHANNELS = 4  # of a latent


def check_folder(folder: Path, name: str, inpainting: bool = False) -> None:
    """Raises BaseModelError unless a diffusers folder is SDXL and has all that loading needs."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise BaseModelError(
            f"base model '{name}' has no model_index.json; wanted a diffusers SDXL folder."
        )
    facts, unet = _read_config(index, name), _read_config(folder / "unet" / "config.json", name)
    if "text_encoder_2" not in facts or unet.get("addition_embed_type") != "text_time":
        raise BaseModelError(
            f"base model '{name}' is {facts.get('_class_name', 'unknown')}, not SDXL "
            "(two text encoders and a text_time UNet); choose an SDXL base."
        )
    _check_channels(name, unet.get("in_channels", CHANNELS), inpainting)
    for part in ("tokenizer", "tokenizer_2"):
        _check_tokenizer(folder / part, name)
    for config in ("scheduler/scheduler_config.json", *(f"{p}/config.json" for p in WEIGHED)):
        _read_config(folder / config, name)
    for part in WEIGHED:
        files = sorted((folder / part).glob("*.safetensors"))
        if not files:
            raise BaseModelError(
                f"base model '{name}' has no .safetensors weights in {part} (a .bin can run code, "
                "and is not read); copy them from the SDXL base."
            )
        for weights in files:
            read_header(weights)


def check_checkpoint(path: Path, inpainting: bool = False) -> None:
    """Raises BaseModelError unless a single file is SDXL's, FileFormatError where it is damaged."""
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"base model '{path}' is {path.suffix or 'no known file'}; only .safetensors is read "
            "(a .ckpt can run code): save it as .safetensors in the tool it came from."
        )
    tensors = read_header(path).tensors
    if not all(any(k.startswith(prefix) for k in tensors) for prefix in REFINED_KEYS):
        raise BaseModelError(
            f"base model '{path.name}' is no SDXL checkpoint: it lacks the two text encoders "
            "(conditioner.embedders.0 and .1); choose an SDXL base."
        )
    if (entry := tensors.get(ENTRY_KEY)) is not None and len(entry.shape) == 4:
        _check_channels(path.name, entry.shape[1], inpainting)


def variant_of(folder: Path) -> str | None:
    """`fp16` or the like, where weights of a part are there in no other form; else None."""
    for part in WEIGHED:
        names = [p.name for p in (folder / part).glob("*.safetensors")]
        for kind in VARIANTS:
            if names and all(f".{kind}." in n for n in names):
                return kind
    return None


def _check_channels(name: str, channels: object, inpainting: bool) -> None:
    if channels != CHANNELS and not inpainting:
        raise BaseModelError(
            f"base model '{name}' takes {channels} channels (an inpainting UNet), and training "
            "gives 4; choose the ordinary base that it was made from."
        )


def _check_tokenizer(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise BaseModelError(
            f"base model '{name}' has no folder {folder.name}; copy it from the SDXL base."
        )
    missing = [file for file in TOKENIZER_FILES if not (folder / file).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            f"base model '{name}' has no {' and no '.join(missing)} in {folder.name}; copy the "
            "folder from the SDXL base."
        )


def _read_config(path: Path, name: str) -> dict[str, Any]:
    """A component's configuration. Raises BaseModelError where it is missing or none."""
    place = f"{path.parent.name}/{path.name}" if path.name != "model_index.json" else path.name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"base model '{name}' has no {place}; copy the folder from the SDXL base."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"base model '{name}' is damaged: {place}: {error}") from error
    if not isinstance(found, dict):
        raise BaseModelError(f"base model '{name}' is damaged: {place} holds no table.")
    return found
