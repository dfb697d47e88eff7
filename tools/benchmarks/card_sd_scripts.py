"""A second baseline on a card: the step of kohya-ss/sd-scripts, from a checkout in SD_SCRIPTS.

Its UNet (library/sdxl_original_unet.py) and its network (networks/lora.py: 722 layers) are its own;
around them stands what train_network.py does in a step with --mixed_precision bf16 --sdpa
--optimizer_type AdamW8bit and cached latents and text. Nothing of it comes with this project.
Weights, latents and text are random: only shapes matter to time and memory.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.card import Card, Side
from benchmarks.card_example import make_optimizer
from benchmarks.card_steps import MEMORY_BAR, WARM, CardTraining, Setting
from benchmarks.measure import MB, WALL, Row
from benchmarks.real_base import fill_weights
from benchmarks.steps import RATE
from lcp_plugin.errors import ConfigError
from lcp_plugin.hooks import StepReport

WHERE = "SD_SCRIPTS"  # the environment's variable
STEP_BAR = 0.95
NARROW = 64  # channels where the code is only tried, 320 in SDXL
STATES, VECTOR = (1, 77, 2048), (1, 2816)  # text, and pooled text with sizes


def measure_sd_scripts(card: Card) -> Iterator[Row]:
    """Rows: seconds and peak memory of a step against sd-scripts', with checkpointing and without.

    Raises:
        ConfigError: SD_SCRIPTS names no checkout.
    """
    for checkpointing in (False, True):
        setting = Setting("transformer", checkpointing)
        theirs = Side(card)
        with theirs.running(counts=False):
            step = SdScripts(card, setting)
        with tempfile.TemporaryDirectory() as folder:
            ours = CardTraining(card, Path(folder), setting)

            def between(report: StepReport, side: Side = theirs, other: SdScripts = step) -> None:
                with side.running():
                    other.step()

            ours.train(between)
        name = f"{card.label}, {card.side} px, bf16, rank {setting.rank}, {setting.words}"
        note = "baseline: sd-scripts, SDPA, its 722 layers"
        seconds = ours.side.median_seconds(WARM), theirs.median_seconds(WARM)
        yield Row(f"step beside sd-scripts, {name}", *seconds, WALL, bar=STEP_BAR, note=note)
        if card.counts_memory:
            peaks = ours.side.peak_mb(WARM), theirs.peak_mb(WARM)
            label = f"peak memory beside sd-scripts, {name}"
            yield Row(label, *peaks, MB, bar=MEMORY_BAR, note=note)


class SdScripts:
    """Its UNet and network in training; `step` is one whole optimizer step of batch size 1."""

    def __init__(self, card: Card, setting: Setting) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler

        unets, lora = find_modules()
        device, self.dtype = torch.device(card.device), torch.bfloat16
        unet = build_unet(unets, card)
        self.network = lora.create_network(1.0, setting.rank, setting.rank, None, [], unet)
        self.network.apply_to([], unet, False, True)
        if setting.checkpointing:
            unet.enable_gradient_checkpointing()
        groups, _ = self.network.prepare_optimizer_params(None, RATE, RATE)
        optimizer = make_optimizer([p for group in groups for p in group["params"]], RATE)
        self.accelerator = Accelerator(mixed_precision="bf16")
        self.unet = self.accelerator.prepare(unet)
        self.network, self.optimizer, self.rates = self.accelerator.prepare(
            self.network, optimizer, get_scheduler("constant", optimizer=optimizer)
        )
        self.unet.train(setting.checkpointing)
        self.network.prepare_grad_etc([], unet)
        self.network.on_epoch_start([], unet)
        self.checkpointing = setting.checkpointing
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        side = card.side // 8
        self.latents = torch.randn(1, 4, side, side, device=device)
        self.states = torch.randn(STATES, device=device).to(self.dtype)
        self.vector = torch.randn(VECTOR, device=device).to(self.dtype)

    def step(self) -> float:
        """One step; its loss."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.network):
            noise = torch.randn_like(self.latents)
            timesteps = torch.randint(0, 1000, (1,), device=self.latents.device)
            noisy = self.scheduler.add_noise(self.latents, noise, timesteps)
            if self.checkpointing:
                self.states.requires_grad_(True)
            with accelerator.autocast():
                noisy = noisy.requires_grad_(True).to(self.dtype)
                predicted = self.unet(noisy, timesteps, self.states, self.vector)
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="none").mean()
            accelerator.backward(loss)
            trained = accelerator.unwrap_model(self.network).get_trainable_params()
            accelerator.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach().item())


def find_modules() -> tuple[Any, Any]:
    """(library.sdxl_original_unet, networks.lora) of the checkout.

    Raises:
        ConfigError: SD_SCRIPTS is not set, or no such files are there.
    """
    folder = os.environ.get(WHERE, "")
    if not folder or not (Path(folder) / "networks" / "lora.py").is_file():
        raise ConfigError(
            f"sd_scripts: {WHERE} = {folder!r}; set it to a checkout of kohya-ss/sd-scripts."
        )
    if folder not in sys.path:
        sys.path.insert(0, folder)
    names = "library.sdxl_original_unet", "networks.lora"
    unets, lora = (importlib.import_module(name) for name in names)
    return unets, lora


def build_unet(unets: Any, card: Card) -> Any:
    """Its UNet in bf16 on the device, frozen; narrow at sizes that only try the code."""
    if card.size != "sdxl":
        unets.MODEL_CHANNELS, unets.TIME_EMBED_DIM = NARROW, 4 * NARROW
    with torch.device("meta"):
        unet: Any = unets.SdxlUNet2DConditionModel()
    unet = unet.to(torch.bfloat16).to_empty(device=card.device).requires_grad_(False)
    fill_weights(unet)
    unet.set_use_sdpa(True)
    return unet
