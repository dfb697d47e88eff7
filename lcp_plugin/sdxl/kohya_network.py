"""The LoRA network that sd-scripts trains: our sites on its UNet and text encoders.

What earlier tasks left lies under the factors: in fp32 weights for good, W' = W + D once in fp32;
beside half-precision ones while the delta is stacked, because rounding would take small updates
away, and stochastically rounded into them where it is dense. The methods that sd-scripts calls have
its names and meaning (networks/lora.py and train_network.py at 48d368fa); what a task boundary does
with the network is `lcp_plugin.kohya`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import Biases
from lcp_plugin.delta import Delta, Stacked
from lcp_plugin.formats.keys import PREFIXES
from lcp_plugin.sdxl.layers import check_fits, choose_targets, choose_text_targets, weight_of
from lcp_plugin.sdxl.live_biases import add_biases
from lcp_plugin.sdxl.sites import LoraPair, Site, fuse_for_good, limit_norms


def choose_layers(layers: Mapping[str, nn.Module], targets: str) -> list[str]:
    """What networks.lora trains: the UNet's `targets` (`transformer`: its 722 linear layers on
    SDXL), and attention and MLP of the text encoders.
    """
    return sorted([*choose_targets(layers, targets), *choose_text_targets(layers)])


class LoraNetwork(nn.Module):
    """Factors on another trainer's models, and what lies under them."""

    def __init__(
        self, multiplier: float, layers: Mapping[str, nn.Module], dropouts: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.adapted = nn.ModuleDict()  # the pairs, under names without dots
        self._layers, self._dropouts = dict(layers), dict(dropouts)
        self._sites: dict[str, Site] = {}
        self._beside = Delta()  # of the half-precision layers

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            self._sites[name] = Site(name, self._layers[name])
        return self._sites[name]

    @property
    def pairs(self) -> dict[str, LoraPair]:
        """Layer name -> its factors, of the layers that train."""
        return {name: site.pair for name, site in self._sites.items() if site.pair is not None}

    def set_base(self, delta: Delta) -> None:
        """Puts a delta under the training, on top of what lies there.

        Raises:
            LineageError: a module or shape that the base does not have.
        """
        self.check_fits(delta)
        for name, entry in delta.items():
            layer = self._layers[name]
            if isinstance(entry, Stacked) and weight_of(layer).dtype is not torch.float32:
                self._beside = self._beside + Delta({name: entry})
                self._site(name).set_branch(self._beside[name])
            else:
                fuse_for_good(name, layer, entry)

    def add_biases(self, changes: Biases) -> None:
        """Puts changes of biases under the training, for good. Raises LineageError."""
        add_biases(self._layers, changes)

    def set_factors(self, adapter: Adapter, trainable: frozenset[str]) -> None:
        """Starts training from these; alphas are theirs. Raises LineageError, as `set_base`."""
        self.check_fits(adapter)
        for name, factors in adapter.items():
            pair = LoraPair(factors, trainable)
            pair.multiplier = self.multiplier
            for kind, share in self._dropouts.items():
                setattr(pair, kind, share)
            self._site(name).pair = self.adapted[name.replace(".", "/")] = pair

    def check_fits(self, values: Mapping[str, Any]) -> None:
        """Raises LineageError if a delta or adapter has a module or shape that the base lacks."""
        check_fits(self._layers, values)

    def trained(self) -> Adapter:
        """The factors as they are now, as a value."""
        return Adapter({name: pair.factors() for name, pair in self.pairs.items()})

    # ---------------------------------------------------------------------- what sd-scripts calls

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the factors in training; earlier tasks stay in effect."""
        self.multiplier = multiplier
        for pair in self.pairs.values():
            pair.multiplier = multiplier

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the factors run inside the trainer's own checkpoints."""

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        """requires_grad as the strategy wants it."""
        for pair in self.pairs.values():
            pair.freeze_untrainable()

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        """Dropouts on."""
        self.train()

    def on_step_start(self, text_encoder: object, unet: object) -> None:
        """Nothing to do."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """What gradients are clipped over."""
        return [p for p in self.parameters() if p.requires_grad]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups with their learning rates, and their names."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(
            text_encoder_lr, unet_lr, default_lr
        )

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and their names, with one rate for each text encoder.

        A group whose rate is 0 does not train; None is the default rate.
        """
        text = text_encoder_lr
        given: list[float | None] = list(text) if isinstance(text, Sequence) else [text]
        given = given or [None]
        rates = [unet_lr, given[0], given[-1]]  # one rate for both, or one for each
        groups, names = [], []
        for prefix, asked in zip(PREFIXES, rates, strict=True):
            rate = default_lr if asked is None else asked
            pairs = [pair for name, pair in self.pairs.items() if name.startswith(prefix)]
            params = [p for pair in pairs for p in pair.parameters() if p.requires_grad]
            if params and rate:
                groups.append({"params": params, "lr": rate})
                names.append(prefix[:-1])
        return groups, names

    def apply_max_norm_regularization(
        self, max_norm: float, device: object
    ) -> tuple[int, float, float]:
        """--scale_weight_norms: updates above the norm are scaled down, half in A, half in B.

        Returns:
            number scaled, mean norm, largest norm (after scaling).
        """
        limited = limit_norms(self.pairs.values(), max_norm)
        norms = [norm for norm, _ in limited]
        mean = sum(norms) / len(norms) if norms else 0.0
        return sum(larger for _, larger in limited), mean, max(norms, default=0.0)

    def is_mergeable(self) -> bool:
        """It can be fused into the base."""
        return True
