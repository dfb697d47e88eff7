"""A LiveBase on the toy base, looked at and written to from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.config.options import Options
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.tasks import Task


def toy_options(**given: Any) -> Options:
    """What `make_base` builds with."""
    return Options(**{"network_train_unet_only": True, "learning_rate": 0.1, **given})


def attach(base: LiveBase, **given: Any) -> list[dict[str, Any]]:
    """Puts a fresh adapter on, as the options ask for it, and returns the optimizer's groups."""
    from lcp_plugin.training.modules import make_groups, make_spec

    options = toy_options(**given)
    spec = make_spec(base.adapted, options, Task(1, "a", "object", "a", ()), seed=7)
    base.adapted.attach(spec.gaussian())
    return make_groups(base.adapted, options)


def predict(base: LiveBase) -> Tensor:
    """The UNet's output for fixed inputs."""
    from lcp_plugin.sdxl.adapted_unet import run_unet

    unet = base.pipeline.unet
    generator = torch.Generator().manual_seed(0)
    batch = {
        "encoder_hidden_states": torch.randn(
            1, 77, unet.config.cross_attention_dim, generator=generator
        ),
        "text_embeds": torch.randn(
            1, base.pipeline.text_encoder_2.config.projection_dim, generator=generator
        ),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return run_unet(base.adapted, latents, torch.tensor([500]), batch, base.dtype)


def first_linear(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, nn.Linear))


def random_lora(base: LiveBase, path: Path, size: float = 0.1) -> Path:
    """A LoRA of two modules with random factors."""
    from lcp_plugin.sdxl.layers import choose_targets, layer_shape

    layers, generator = base.adapted.layers, torch.Generator().manual_seed(1)
    factors = {}
    for name in choose_targets(layers, "attention")[:2]:
        out, inputs = layer_shape(layers[name])
        down, up = (torch.randn(s, generator=generator) for s in ((2, inputs), (out, 2)))
        factors[name] = Factors(down, size * up, 2.0)
    write_lora(path, Adapter(factors))
    return path
