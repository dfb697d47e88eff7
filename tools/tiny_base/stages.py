"""The stages of pretraining, one after another on files in a working folder.

wide.npy, world.npy         drawn pictures
vae.safetensors             checkpoint of the autoencoder
vae_final.safetensors       its averaged, whitened weights; facts in vae.json
latents.safetensors         the world's scenes, encoded
unet.safetensors            checkpoint of UNet and text encoders; facts in unet.json
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcp_plugin.errors import DataError
from lcp_plugin.sdxl.latents import encode_pixels
from lcp_plugin.telling.wording import counted
from lcp_plugin.tiny.architecture import (
    SCALING_FACTOR,
    TINY,
    Architecture,
    build_pipeline,
    save_pipeline,
)
from tiny_base.precision import fast_autocast
from tiny_base.pretrain_unet import TRAINED, train_unet, zero_outputs
from tiny_base.pretrain_vae import (
    measure_psnr,
    to_tensor,
    train_vae,
    whiten_latents,
    write_facts,
)
from tiny_base.render import Sprites, draw_scene
from tiny_base.schedule import Budget, Stage, load_checkpoint
from tiny_base.wide import draw_pool, draw_wide
from tiny_base.world import Scene, sample_scene

Drawing = Callable[[np.random.Generator], NDArray[np.uint8]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What all stages share."""

    work: Path  # working folder, outside the repository
    sprites: Path  # folder with the unpacked npm packages
    seed: int = 0
    sizes: Architecture = TINY
    wide_pictures: int = 24_000
    world_pictures: int = 60_000


def run_vae(plan: Plan, budget: Budget) -> dict[str, Any]:
    """Train, whiten and measure the autoencoder."""
    side, sprites = plan.sizes.resolution, Sprites(plan.sprites)
    pool = _drawn_once(
        plan.work / "wide.npy",
        lambda rng: draw_wide(rng, sprites, side),
        plan.seed,
        plan.wide_pictures,
    )
    vae = build_pipeline(plan.sizes, plan.seed).vae
    use_plain_attention(vae)
    budget.restart()
    facts = train_vae(vae, pool, Stage(plan.work / "vae.safetensors", budget, plan.seed))
    whiten_latents(vae, pool[:4000], SCALING_FACTOR)
    facts |= measure_vae(vae, plan)
    save_weights(vae, plan.work / "vae_final.safetensors")
    write_facts(plan.work / "vae.json", facts)
    return facts


def run_world(plan: Plan) -> None:
    """Draw the world's pictures (no autoencoder needed yet)."""
    side, sprites = plan.sizes.resolution, Sprites(plan.sprites)
    _drawn_once(
        plan.work / "world.npy",
        lambda rng: draw_scene(sample_scene(rng), sprites, side),
        plan.seed + 1,
        plan.world_pictures,
    )


def run_unet(plan: Plan, budget: Budget, start: Path | None = None) -> dict[str, Any]:
    """Encode the world and train UNet and text encoders on it, from nothing or from the weights of
    the model folder `start` (the autoencoder too, if there is none yet)."""
    run_world(plan)
    pipeline = build_pipeline(plan.sizes, plan.seed)
    if start is not None:
        load_start(pipeline, start)
        if not (plan.work / "vae_final.safetensors").exists():
            save_weights(pipeline.vae, plan.work / "vae_final.safetensors")
    load_vae(pipeline, plan)
    latents = _encoded_once(pipeline.vae, plan)
    if start is None:
        zero_outputs(pipeline.unet)
    use_plain_attention(pipeline.unet)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.set_attn_implementation("eager")
    budget.restart()
    stage = Stage(plan.work / "unet.safetensors", budget, plan.seed)
    facts = train_unet(pipeline, latents, world_scenes(plan), stage, young=start is None)
    write_facts(plan.work / "unet.json", facts)
    return facts


def export_model(plan: Plan, folder: Path) -> Any:
    """Put the averaged weights of the latest checkpoints into `folder`, file by file by rename, so
    that a reader finds each file whole. Returns the pipeline as shipped (fp16 values in fp32)."""
    pipeline = build_pipeline(plan.sizes, plan.seed)
    load_vae(pipeline, plan)
    checkpoint = plan.work / "unet.safetensors"
    if checkpoint.exists():
        tensors, facts = load_checkpoint(checkpoint)
        logger.info("exporting step %d", facts["steps"])
        for part in TRAINED:
            prefix = f"average/{part}."
            weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            getattr(pipeline, part).load_state_dict(weights, strict=False)
    fresh = plan.work / "export"
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(pipeline, fresh)
    for source in sorted(file for file in fresh.rglob("*") if file.is_file()):
        target = folder / source.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        part_file = target.with_name(target.name + ".part")
        shutil.copyfile(source, part_file)
        os.replace(part_file, target)
    return pipeline.to(torch.float32)


def load_start(pipeline: Any, folder: Path) -> None:
    """Put the weights of an exported model into `pipeline`; DataError if they do not fit."""
    from diffusers import StableDiffusionXLPipeline

    trained = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    for part in ("vae", *TRAINED):
        weights = getattr(trained, part).state_dict()
        try:
            getattr(pipeline, part).load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(
                f"{folder}: its {part} has other sizes than the one to train; "
                f"wanted a model that this tool exported ({str(error).splitlines()[0]})."
            ) from error


def load_vae(pipeline: Any, plan: Plan) -> None:
    """Put the finished autoencoder into `pipeline`; DataError if there is none yet."""
    from safetensors.torch import load_file

    file = plan.work / "vae_final.safetensors"
    if not file.exists():
        raise DataError(
            f"No autoencoder in {plan.work}; wanted vae_final.safetensors; run --stage vae first."
        )
    pipeline.vae.load_state_dict(load_file(file))


def use_plain_attention(model: Any) -> None:
    """Attention by matrix products: on a CPU its backward takes half the time of the fused one."""
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())


def measure_vae(vae: Any, plan: Plan) -> dict[str, float]:
    """PSNR on pictures no training saw: held-out pairs of the world, and new wide pictures."""
    side, unseen, sprites = plan.sizes.resolution, plan.seed + 1_000_003, Sprites(plan.sprites)
    world = draw_pool(
        lambda rng: draw_scene(sample_scene(rng, held_out=True), sprites, side), unseen, 512
    )
    wide = draw_pool(lambda rng: draw_wide(rng, sprites, side), unseen, 512)
    return {"psnr_held_out_world": measure_psnr(vae, world), "psnr_wide": measure_psnr(vae, wide)}


def world_scenes(plan: Plan) -> list[Scene]:
    """The scenes of world.npy, in its order."""
    seeds = ([plan.seed + 1, index] for index in range(plan.world_pictures))
    return [sample_scene(np.random.default_rng(seed)) for seed in seeds]


def save_weights(model: Any, file: Path) -> None:
    """Weights of a finished model, by rename."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def _drawn_once(file: Path, draw: Drawing, seed: int, count: int) -> NDArray[np.uint8]:
    if not file.exists():
        logger.info("drawing %s for %s", counted(count, "picture"), file.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        np.save(part, draw_pool(draw, seed, count))
        os.replace(part, file)
    pictures: NDArray[np.uint8] = np.load(file, mmap_mode="r", allow_pickle=False)
    return pictures


def _encoded_once(vae: Any, plan: Plan) -> Tensor:
    """Latents of the world with standard deviation 1: (n, 4, h, w), fp16."""
    from safetensors.torch import load_file, save_file

    file = plan.work / "latents.safetensors"
    if not file.exists():
        logger.info("encoding %s", counted(plan.world_pictures, "picture"))
        pictures = np.load(plan.work / "world.npy", mmap_mode="r", allow_pickle=False)
        parts = []
        with torch.no_grad(), fast_autocast():
            for start in range(0, len(pictures), 100):
                parts.append(encode_pixels(vae, to_tensor(pictures[start : start + 100])).half())
        save_file({"latents": torch.cat(parts).contiguous()}, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    latents: Tensor = load_file(file)["latents"]
    return latents
