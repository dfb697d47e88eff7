"""Filling networks from their published files, without unpickling anything.

Tensors are read by `checkpoints.read_checkpoint` and handed to transformers, which knows the key
layouts of its own models, old and new. OpenAI's layout of a CLIP visual tower
(`backbone.conv1.weight`, `backbone.transformer.resblocks.0.attn.in_proj_weight`, ...), perhaps
below `model_state_dict.` and `module.`, is renamed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lcp_plugin.errors import EncoderError, Page, explaining
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.encoders import EncoderFiles
from lcp_plugin.formats.disk import first_line, read_json
from lcp_plugin.sdxl.base_files import TOKENIZER_FILES
from lcp_plugin.telling.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterator


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without `model_state_dict.`, `state_dict.` and `module.` in front; other branches of the
    file (an optimizer's state) are dropped where a model's branch exists.
    """
    for branch in ("model_state_dict.", "state_dict."):
        inside = {k.removeprefix(branch): t for k, t in tensors.items() if k.startswith(branch)}
        tensors = inside or tensors
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def rename_openai_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's visual tower (`backbone.*`) under the names of transformers' CLIPVisionModel."""
    plain = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    parts = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("backbone.")
        if not key.startswith("backbone.") or name == "proj":
            continue
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        stem, _, kind = (
            (layer[2] if layer else name).replace("in_proj_", "in_proj.").rpartition(".")
        )
        if name in plain:
            renamed[plain[name]] = tensor
        elif layer and stem == "attn.in_proj":
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{layer[1]}.self_attn.{part}_proj.{kind}"] = chunk
        elif layer:
            renamed[f"encoder.layers.{layer[1]}.{inner.get(stem, stem)}.{kind}"] = tensor
        else:
            renamed[f"{parts.get(stem, stem)}.{kind}"] = tensor
    return renamed


def count_layers(tensors: Mapping[str, Tensor]) -> int:
    found = (re.match(r"backbone\.transformer\.resblocks\.(\d+)\.", key) for key in tensors)
    return 1 + max(int(match[1]) for match in found if match)


def build_transformers(
    model_class: Any, config_class: Any, files: EncoderFiles, **options: Any
) -> Any:
    """A model from config.json and a weight file, every parameter filled from the file."""
    config_file = files.others.get("config.json")
    if config_file is None:
        raise EncoderError(
            f"encoder '{files.name}': no config.json beside {files.weights}; put it there."
        )
    if not isinstance(table := read_json(config_file), dict):
        raise EncoderError(f"{config_file} is no configuration of a network: it is no table.")
    config = config_class(**table)
    with _quiet_transformers():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=read_checkpoint(files.weights),
            output_loading_info=True,
            **options,
        )
    _refuse_missing(files, found["missing_keys"], found.get("mismatched_keys", ()))
    return model


@explaining(Page.SCORES)
def load_clip_tokenizer(files: EncoderFiles, vocabulary: int) -> Any:
    """The tokenizer beside a CLIP's weights; `vocabulary`: the rows of its token embedding.

    Of a folder without a vocabulary transformers makes one that tells no two prompts apart.

    Raises:
        FileFormatError: missing, damaged, or of another network.
    """
    from transformers import CLIPTokenizer

    folder = files.weights.parent
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise EncoderError(
            f"encoder '{files.name}': no {' and no '.join(missing)} beside {files.weights}, so it "
            "reads no prompts; put them there, or leave out the metric that compares with prompts."
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        largest = max(tokenizer.get_vocab().values())
        tokenizer("a photo")  # the words that begin and end a prompt are asked for only now
    except Exception as error:  # tokenizers raises bare ones
        raise EncoderError(
            f"encoder '{files.name}': its vocabulary in {folder} is damaged ({first_line(error)}); "
            f"copy {' and '.join(TOKENIZER_FILES)} of that network again."
        ) from error
    if largest >= vocabulary:
        raise EncoderError(
            f"encoder '{files.name}': the vocabulary in {folder} has "
            f"{counted(largest + 1, 'word')}, its weights {vocabulary}; it is another network's."
        )
    return tokenizer


def fill_module(model: nn.Module, tensors: Mapping[str, Tensor], files: EncoderFiles) -> None:
    """Fills a module; tensors it does not know are left out, none of its own may be missing."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {_with_prefix(name, shapes): tensor for name, tensor in tensors.items()}
    known = {n: t.float() for n, t in tensors.items() if n in shapes}
    counters = {n for n in shapes if n.endswith(("num_batches_tracked", "position_ids"))}
    wrong = [n for n, t in known.items() if t.shape != shapes[n]]
    _refuse_missing(files, shapes.keys() - known.keys() - counters, wrong)
    model.load_state_dict(known, strict=False)


def _with_prefix(name: str, shapes: Mapping[str, Any]) -> str:
    """transformers 4 has `vision_model.` in front of a tower's names, version 5 has not."""
    return f"vision_model.{name}" if f"vision_model.{name}" in shapes else name


def _refuse_missing(files: EncoderFiles, missing: Any, mismatched: Any) -> None:
    lacking = sorted(missing) or sorted(str(m) for m in mismatched)
    if lacking:
        what = "lacks" if missing else "has other shapes for"
        raise EncoderError(
            f"{files.weights} is not the weights of '{files.name}': it {what} "
            f"{counted(len(lacking), 'tensor')}, {lacking[0]} among them."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no notes about unused keys (a text tower, a pooler) while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
