"""A diffusers SDXL folder as one checkpoint file in Stability's layout, streamed.

    unet            model.diffusion_model.   SGM block numbers (keys.to_sgm)
    text_encoder    conditioner.embedders.0.transformer.   transformers' own names
    text_encoder_2  conditioner.embedders.1.model.   OpenCLIP: q, k, v in one in_proj, the
                    projection transposed
    vae             first_stage_model.   down / up / mid with up blocks counted from the finest;
                    attention as 1 x 1 convolutions

(stability-ai/generative-models' state dict, as diffusers.loaders.single_file reads it.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.errors import BaseModelError
from lcp_plugin.formats.disk import replacing, require_free_space
from lcp_plugin.formats.keys import canonical, to_sgm
from lcp_plugin.formats.tensors import DTYPES, TensorInfo, TensorReader, build_header, raw_bytes

TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_VAE_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "group_norm": "norm",
}
_TEXT_2 = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_TEXT_2_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


@dataclass(frozen=True)
class Piece:
    """A tensor on disk."""

    reader: TensorReader
    name: str

    @property
    def info(self) -> TensorInfo:
        """Type and shape."""
        return self.reader.header.tensors[self.name]


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint, made of one piece, or of q, k and v stacked."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    def read(self) -> Tensor:
        """The tensor as the checkpoint holds it."""
        parts = [piece.reader.read(piece.name) for piece in self.pieces]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (whole.T if self.transposed else whole).reshape(self.shape).contiguous()


def write_single_file(folder: str | Path, path: str | Path) -> None:
    """Write the weights of a diffusers SDXL folder as one checkpoint.

    Raises:
        BaseModelError: weights that are missing, a tensor that has no place in the layout, or
            text encoders of one width.
        DiskError: the write failed.
    """
    folder, path = Path(folder), Path(path)
    targets: dict[str, CheckpointTensor] = {}
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        targets.update(_component(component, _find_pieces(folder / component)))
    _check_widths(folder, targets)
    word = {name: target.pieces[0].info.dtype for name, target in targets.items()}
    order = list(DTYPES)
    names = sorted(targets, key=lambda n: (-order.index(word[n]), n.encode()))
    layout = {name: (word[name], targets[name].shape) for name in names}
    size = sum(p.info.end - p.info.start for t in targets.values() for p in t.pieces)
    require_free_space(path.parent, size, f"the checkpoint {path.name}")
    with replacing(path) as temporary, temporary.open("wb") as out:
        out.write(build_header(layout, {"format": "pt"}))
        for name in names:
            out.write(raw_bytes(targets[name].read()))


def _check_widths(folder: Path, targets: Mapping[str, CheckpointTensor]) -> None:
    """diffusers takes the encoder of a file by its width, so two equal ones become one."""
    first = targets[f"{TEXT_1}text_model.embeddings.position_embedding.weight"]
    if first.shape[-1] == targets[f"{TEXT_2}positional_embedding"].shape[-1]:
        raise BaseModelError(
            f"both text encoders of {folder.name} are {first.shape[-1]} wide, and diffusers would "
            "mistake one for the other in a single file; export a diffusers folder instead."
        )


def _find_pieces(folder: Path) -> dict[str, Piece]:
    """All tensors of a component; a full-precision set is preferred over an .fp16 variant."""
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if not re.search(r"\.(fp16|bf16)\b", file.name)]
    readers = [TensorReader(file) for file in plain or found]
    pieces = {name: Piece(r, name) for r in readers for name in r.header.tensors}
    if not pieces:
        raise BaseModelError(f"{folder} holds no .safetensors weights; wanted a diffusers folder.")
    return pieces


def _component(
    component: str, pieces: Mapping[str, Piece]
) -> Iterator[tuple[str, CheckpointTensor]]:
    if component == "unet":
        yield from _unet(pieces)
    elif component == "vae":
        yield from _vae(pieces)
    else:
        ours = {canonical(f"{component}.{n}").split(".", 1)[1]: p for n, p in pieces.items()}
        ours = {n: p for n, p in ours.items() if not n.endswith("position_ids")}
        yield from (_text_1 if component == "text_encoder" else _text_2)(ours)


def _as_is(piece: Piece) -> CheckpointTensor:
    return CheckpointTensor((piece,), piece.info.shape)


def _unet(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, CheckpointTensor]]:
    for name, piece in pieces.items():
        module, _, kind = name.rpartition(".")
        yield f"model.diffusion_model.{to_sgm(module)}.{kind}", _as_is(piece)


def _text_1(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, CheckpointTensor]]:
    for name, piece in pieces.items():
        yield TEXT_1 + name, _as_is(piece)


def _text_2(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, CheckpointTensor]]:
    for name, piece in pieces.items():
        if name in _TEXT_2_OUTSIDE:
            shape, turned = piece.info.shape, name == "text_projection.weight"
            target = CheckpointTensor((piece,), shape[::-1] if turned else shape, turned)
            yield TEXT_2 + _TEXT_2_OUTSIDE[name], target
            continue
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            raise BaseModelError(f"text_encoder_2's {name} has no place in an SDXL checkpoint.")
        layer, inside, kind = match.groups()
        block = f"{TEXT_2}transformer.resblocks.{layer}"
        if inside == "self_attn.q_proj":
            every = tuple(pieces[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
            rows = 3 * piece.info.shape[0]
            yield (
                f"{block}.attn.in_proj_{kind}",
                CheckpointTensor(every, (rows, *piece.info.shape[1:])),
            )
        elif inside in _TEXT_2:
            yield f"{block}.{_TEXT_2[inside]}.{kind}", _as_is(piece)


def _vae(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, CheckpointTensor]]:
    numbers = [int(m[1]) for n in pieces if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", n))]
    levels = 1 + max(numbers, default=0)
    for name, piece in pieces.items():
        module, _, kind = name.rpartition(".")
        attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", module)
        shape = piece.info.shape
        if attention:
            module = f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}"
            shape = (*shape, 1, 1) if len(shape) == 2 else shape
        else:
            module = _vae_module(module, levels)
        yield f"first_stage_model.{module}.{kind}", CheckpointTensor((piece,), shape)


def _vae_module(module: str, levels: int) -> str:
    module = re.sub(
        r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", module
    )
    for pattern, words in (
        (r"^encoder\.down_blocks\.", "encoder.down."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.resnets\.", ".block."),
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
        (r"\.conv_shortcut$", ".nin_shortcut"),
        (r"\.conv_norm_out$", ".norm_out"),
    ):
        module = re.sub(pattern, words, module)
    return module
