"""Base models: a diffusers folder, a hub id, a single-file checkpoint, or our own `tiny-sdxl`.

Everything is checked before weights are read: the class in model_index.json or the tensor names in
the checkpoint's header. A pickle (.ckpt, .pt) is never opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcp_plugin.errors import BaseModelError, FileFormatError, Page, explaining
from lcp_plugin.formats.disk import first_line
from lcp_plugin.formats.identity import hash_file
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.base_files import TOKENIZER_FILES, check_checkpoint, check_folder, variant_of
from lcp_plugin.sdxl.devices import calm_threads
from lcp_plugin.sdxl.samplers import create_sampler

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

TINY_NAME = "tiny-sdxl"
WEIGHT_FOLDERS = ("unet", "text_encoder", "text_encoder_2")
# keys of a single file whose mere presence says how it was trained: v-prediction; v-prediction
# whose last timestep is pure noise
PUBLISHED_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"  # whose configs diffusers takes
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"


@dataclass(frozen=True)
class BaseId:
    """Which published weights a run stands on."""

    name: str  # as the user gave it
    hash: str  # sha256 over the weights of UNet and text encoders, or of the checkpoint file
    origin: str = ""  # what is loaded, where `name` says more than that
    added: Sequence[Mapping[str, Any]] = ()  # base_weights: path, weight and hash of each

    @property
    def short(self) -> str:
        """Name and first digits of the hash, for messages."""
        return f"{self.name} ({self.hash[:10]})"


def load_tokenizer(name: str | None) -> Any | None:
    """The tokenizer of a base, without its models; None where it is not on this machine as yet.

    That of a single file is in the folder of its configs, or in what diffusers has fetched before.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import CLIPTokenizer

    path = find_base(name)
    configs = path if path.is_dir() else _folder_beside(path)
    if configs is None:
        fetched = try_to_load_from_cache(PUBLISHED_SDXL, "tokenizer/vocab.json")
        configs = Path(fetched).parents[1] if isinstance(fetched, str) else path
    folder = Path(configs) / "tokenizer"  # of an empty one transformers would make a tokenizer too
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else None


def find_tokenizer(name: str) -> Any | None:
    """The tokenizer of a base, if it is on this machine, a hub id's download included.

    Raises BaseModelError for a name that is neither on disk nor a hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") != 1 or Path(name).expanduser().exists():
        return load_tokenizer(name)
    files = [try_to_load_from_cache(name, f"tokenizer/{file}") for file in TOKENIZER_FILES]
    if not all(isinstance(file, str) for file in files):
        return None
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(str(files[0])).parent, local_files_only=True)


@explaining(Page.BASE, FileFormatError)
def find_base(name: str | None, inpainting: bool = False) -> Path:
    """The folder or file of a base, checked to be SDXL and whole without reading weights.

    Args:
        inpainting: a UNet of 9 channels will do, since nothing is put through it.
    Raises:
        BaseModelError: nothing there, a pickle, not SDXL, or parts of it are missing.
    """
    if not name:
        raise BaseModelError(
            "no base model: set pretrained_model_name_or_path to a diffusers folder, an SDXL "
            f".safetensors checkpoint, a hub id, or {TINY_NAME} (embedded)."
        )
    if name == TINY_NAME:
        from lcp_plugin.tiny import model_dir

        return model_dir()
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path, name, inpainting)
        return path
    if path.is_file():
        check_checkpoint(path, inpainting)
        return path
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BaseModelError(
            f"base model '{name}' does not exist; give a diffusers folder, a .safetensors file, "
            f"a hub id like org/model, or {TINY_NAME}."
        )
    return _find_on_hub(name)


def _find_on_hub(name: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:
        reason = first_line(error, 300)
        raise BaseModelError(
            f"base model '{name}' is neither on disk nor to be had from the hub ({reason}); "
            "check the name, or download it once with a network."
        ) from error
    check_folder(folder, name)
    return folder


def identify_base(name: str | None) -> BaseId:
    """Name and hash of a base; hashes of big files are remembered by path, size and time."""
    path = find_base(name)
    if path.is_file():
        return BaseId(str(name), hash_file(path))
    digest = hashlib.sha256()
    for folder in WEIGHT_FOLDERS:
        for weights in sorted((path / folder).glob("*.safetensors")):
            digest.update(f"{folder}/{weights.name}:{hash_file(weights)}\n".encode())
    return BaseId(str(name), digest.hexdigest())


def load_pipeline(
    name: str | None,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    config: str | None = None,
) -> StableDiffusionXLPipeline:
    """The base as diffusers' own pipeline on the CPU, in evaluation mode, gradients off.

    Args:
        name: see `find_base`.
        dtype: of UNet and text encoders; the VAE stays in fp32 (SDXL's overflows in fp16).
        vae: a replacement VAE: diffusers folder, hub id or single .safetensors file.
        config: for a single file, a local diffusers folder with the component configs, so that
        nothing is fetched.
    Raises:
        BaseModelError: not found, damaged, or not SDXL.
    """
    path = find_base(name)
    try:
        pipeline = _read_pipeline(path, dtype, config)
    except BaseModelError:
        raise
    except Exception as error:
        reason = first_line(error, 300)
        raise BaseModelError(f"base model '{name}' cannot be loaded: {reason}") from error
    if vae:
        pipeline.vae = load_vae(vae)
    if pipeline.vae.dtype is not torch.float32:
        pipeline.vae.to(torch.float32)
    for component in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        component.requires_grad_(False)
        component.eval()
    pipeline.set_progress_bar_config(disable=True)
    calm_threads(sum(p.numel() for p in pipeline.unet.parameters()))
    return pipeline


def _read_pipeline(path: Path, dtype: torch.dtype, config: str | None) -> StableDiffusionXLPipeline:
    hush_libraries()
    from diffusers import StableDiffusionXLPipeline

    options: dict[str, Any] = {"dtype": dtype}
    if path.is_dir():
        options["variant"] = variant_of(path)
        return StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True, **options)
    local = config or _folder_beside(path)
    if local:
        options["config"] = local
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), **options)
    keys = read_header(path).tensors
    if ZERO_SNR_KEY in keys:
        pipeline.scheduler = create_sampler("euler", pipeline.scheduler, "v_prediction", True)
    elif V_KEY in keys:
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    return pipeline


def hush_libraries() -> None:
    """Progress bars and advice of the libraries (missing torchvision, kernels) off; errors stay."""
    for name in ("bitsandbytes", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _without_compiling():
        import diffusers.quantizers  # noqa: F401
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def _without_compiling() -> Iterator[None]:
    """bitsandbytes, which diffusers imports, hands its CPU kernels to torch.compile while it is
    imported: a fifth of the start-up on a small model. torch's own switch leaves them eager.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _folder_beside(path: Path) -> str | None:
    """A diffusers folder of a checkpoint's configs: `<name>_config` beside it, $LCP_SDXL_CONFIG."""
    beside = path.with_name(path.stem + "_config")
    return str(beside) if beside.is_dir() else os.environ.get("LCP_SDXL_CONFIG")


def check_vae(name: str | None) -> None:
    """Raises BaseModelError, in terms of --vae, for what cannot be a VAE; no weights are read."""
    if not name:
        return
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BaseModelError(f"vae '{name}': only .safetensors files and folders are read.")
        names = read_header(path).tensors
        if not any("decoder.conv_out." in n for n in names):
            raise BaseModelError(f"vae '{name}' holds no VAE (no decoder); name a VAE's file.")
    elif path.is_dir():
        if not any((p / "config.json").is_file() for p in (path, path / "vae")):
            raise BaseModelError(f"vae '{name}' has no config.json; wanted a diffusers VAE folder.")
    elif path.suffix or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BaseModelError(
            f"vae '{name}' does not exist; give a file, a folder or a hub id, or leave vae out."
        )


def load_vae(name: str) -> Any:
    """A replacement VAE in fp32 from a folder, a hub id or a file. Raises BaseModelError."""
    from diffusers import AutoencoderKL

    check_vae(name)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return AutoencoderKL.from_single_file(str(path), dtype=torch.float32)
        subfolder = "vae" if (path / "vae").is_dir() else None
        return AutoencoderKL.from_pretrained(name, subfolder=subfolder, dtype=torch.float32)
    except Exception as error:
        reason = first_line(error, 300)
        raise BaseModelError(f"vae '{name}' cannot be loaded: {reason}") from error


def native_resolution(pipeline: StableDiffusionXLPipeline) -> int:
    """Pixels per side that the base was made for: 1024 for SDXL."""
    return int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)


def without_zero_terminal(pipeline: StableDiffusionXLPipeline) -> None:
    """Betas as they were before a zero-terminal-SNR base rescaled them, where one did."""
    scheduler = pipeline.scheduler
    if scheduler.config.get("rescale_betas_zero_snr"):
        pipeline.scheduler = type(scheduler).from_config(
            scheduler.config, rescale_betas_zero_snr=False
        )


def prediction_type(pipeline: StableDiffusionXLPipeline) -> str:
    """`epsilon` or `v_prediction`, from the base's scheduler."""
    return str(pipeline.scheduler.config.prediction_type)
