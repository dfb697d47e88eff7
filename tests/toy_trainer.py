"""A Trainer on the toy base, looked at and written to from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.formats.lora_file import write_lora


def attach(trainer: Any, **overrides: Any) -> list[dict[str, Any]]:
    """Puts a fresh adapter on and returns the optimizer's groups."""
    from dataclasses import replace

    from lcp_plugin.tasks import Task

    options = replace(trainer.options, **overrides)
    task = Task(1, "a", "object", "a", ())
    trainer.adapted.attach(trainer.spec(task, options).gaussian())
    groups: list[dict[str, Any]] = trainer.make_groups(options)
    return groups


def predict(trainer: Any) -> Tensor:
    """The UNet's output for fixed inputs."""
    from lcp_plugin.sdxl.live import run_unet

    unet = trainer.pipeline.unet
    generator = torch.Generator().manual_seed(0)
    batch = {
        "encoder_hidden_states": torch.randn(
            1, 77, unet.config.cross_attention_dim, generator=generator
        ),
        "text_embeds": torch.randn(
            1, trainer.pipeline.text_encoder_2.config.projection_dim, generator=generator
        ),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return run_unet(trainer.adapted, latents, torch.tensor([500]), batch, trainer.dtype)


def first_linear(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, nn.Linear))


def random_lora(trainer: Any, path: Path, size: float = 0.1) -> Path:
    """A LoRA of two modules with random factors."""
    from lcp_plugin.sdxl.layers import choose_targets, layer_shape

    layers, generator = trainer.adapted.layers, torch.Generator().manual_seed(1)
    factors = {}
    for name in choose_targets(layers, "attention")[:2]:
        out, inputs = layer_shape(layers[name])
        down, up = (torch.randn(s, generator=generator) for s in ((2, inputs), (out, 2)))
        factors[name] = Factors(down, size * up, 2.0)
    write_lora(path, Adapter(factors))
    return path
