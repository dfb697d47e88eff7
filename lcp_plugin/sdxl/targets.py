"""Which layers are adapted, at which rank, alpha and learning rates.

lora_targets names the UNet's linear layers (attention: 560 on SDXL, transformer: kohya's 722);
network_args may add ResnetBlock2D, Downsample2D and Upsample2D (conv_dim: 66 more, of which the 3x3
convolutions have a rank of their own), vary ranks and rates block by block, or leave blocks out;
text encoders have kohya's 264. What has no rank or no rate is not adapted.
Facts: kohya-ss/sd-scripts, networks/lora.py at 48d368fa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lcp_plugin.config.network_args import NetworkArgs
from lcp_plugin.config.options import Options
from lcp_plugin.config.rates import (
    NOTHING_TRAINS,
    PartRates,
    Rates,
    module_rates,
    part_rate,
)
from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.keys import to_sgm
from lcp_plugin.sdxl.layers import choose_targets, choose_text_targets

_CONVOLUTIONAL = (".resnets.", ".downsamplers.", ".upsamplers.")


@dataclass(frozen=True)
class Target:
    """How a layer is adapted."""

    rank: int
    alpha: float
    rates: Rates


@dataclass(frozen=True)
class TargetSettings:
    """What a task adapts, and how where nothing more special is said."""

    layers: str  # of the UNet: attention or transformer
    rank: int
    alpha: float
    rates: PartRates
    args: NetworkArgs  # what differs from block to block

    @classmethod
    def of(cls, options: Options) -> TargetSettings:
        """What the options ask for. Raises ConfigError for network_args that cannot be read."""
        rates = PartRates.of(options)
        return cls(options.lora_targets, options.rank, options.alpha, rates, options.network)

    def of_part(self, module: str) -> Target:
        """How a module is adapted whose block has nothing of its own."""
        rate = part_rate(module, self.rates)
        return Target(self.rank, self.alpha, Rates(rate, rate))


def select_targets(layers: Mapping[str, nn.Module], settings: TargetSettings) -> dict[str, Target]:
    """Layer name -> how it is adapted. `layers`: all linear and convolutional layers by name.

    Raises ConfigError if nothing is left to train.
    """
    names: list[str] = []
    if settings.rates.unet > 0:
        names += choose_targets(layers, settings.layers)
        if settings.args.trains_convolutions:
            names += _choose_convolutional(layers)
    if settings.rates.trains_texts:
        names += choose_text_targets(layers)
    found = {name: _describe(name, layers[name], settings) for name in names}
    found = {name: t for name, t in found.items() if t.rank > 0 and t.rates.trains}
    if not found:
        raise ConfigError(NOTHING_TRAINS)
    return found


def _choose_convolutional(layers: Mapping[str, nn.Module]) -> list[str]:
    """Layers of residual blocks and of samplers between levels."""
    return [
        name
        for name, layer in layers.items()
        if name.startswith("unet.")
        and any(part in name for part in _CONVOLUTIONAL)
        and isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def _describe(name: str, layer: nn.Module, settings: TargetSettings) -> Target:
    args = settings.args
    if not name.startswith("unet."):
        return Target(settings.rank, settings.alpha, module_rates(name, "", settings.rates, args))
    sgm = to_sgm(name.removeprefix("unet."))
    wide = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
    rank = args.rank_of(sgm, wide, settings.rank)
    alpha = args.alpha_of(sgm, wide, settings.alpha) or float(rank)
    return Target(rank, alpha, module_rates(name, sgm, settings.rates, args))


def group_by_rate(
    factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], targets: Mapping[str, Target]
) -> list[dict[str, Any]]:
    """Optimizer groups {"params", "lr"}, one for each rate, of all A's and B's that train.

    `factors`: layer name -> (A, B). A factor that requires no gradient is left out; one whose rate
    is 0 requires none afterwards. Raises ConfigError if nothing is left.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, (down, up) in factors.items():
        rates = targets[name].rates
        for parameter, rate in ((down, rates.down), (up, rates.up)):
            if rate <= 0:
                parameter.requires_grad_(False)
            elif parameter.requires_grad:
                groups.setdefault(rate, []).append(parameter)
    if not groups:
        raise ConfigError("nothing to train: all learning rates are 0; set learning_rate.")
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def special_ranks(targets: Mapping[str, Target], rank: int) -> dict[str, int]:
    """Ranks that differ from network_dim, as AdapterSpec.ranks wants them."""
    return {name: t.rank for name, t in targets.items() if t.rank != rank}


def special_alphas(targets: Mapping[str, Target], alpha: float) -> dict[str, float]:
    """Alphas that differ from network_alpha, as AdapterSpec.alphas wants them."""
    return {name: t.alpha for name, t in targets.items() if t.alpha != alpha}
