"""LoRA layers on the models of another trainer: sd-scripts' own SDXL UNet and both text encoders.

sd-scripts' UNet has SGM's module names, its text encoders are transformers'; each layer is found
under our name. y = W x + D x + multiplier * scale * B A x, added by a forward hook: the trainer's
modules stay what they are. D, what earlier tasks left, is fused into fp32 weights, W' = W + D once
in fp32; on half-precision weights stacked factors run beside the layer instead, because rounding
would destroy them. All tensors are parameters or buffers, so that they move with the network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcp_plugin.adapter import Factors, Kernel
from lcp_plugin.delta import Entry, Stacked
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.keys import canonical, from_sgm, is_module, prefix_of
from lcp_plugin.sdxl.layers import layer_kernel, layer_shape
from lcp_plugin.sdxl.rounding import add_delta

TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.")


def name_layers(unet: nn.Module, text_encoders: list[nn.Module]) -> dict[str, nn.Module]:
    """Our name -> linear or convolution layer of an SDXL UNet (SGM or diffusers) and of its text
    encoders.
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            dotted = name if is_module(f"unet.{name}") else from_sgm(name.replace(".", "_"))
            if dotted:
                layers[f"unet.{dotted}"] = layer
    for prefix, encoder in zip(TEXT_PREFIXES, text_encoders, strict=False):
        for name, layer in encoder.named_modules():
            ours = canonical(prefix + name)
            if isinstance(layer, nn.Linear) and is_module(ours):
                layers[ours] = layer
    return layers


def choose_layers(layers: dict[str, nn.Module], targets: str) -> list[str]:
    """What networks.lora trains: every linear layer in the UNet's attention blocks (`transformer`,
    722 on SDXL) or the attention projections alone (`attention`, 560), and in the text encoders
    attention and MLP.
    """
    chosen = []
    for name, layer in layers.items():
        if prefix_of(name) != "unet.":
            inside = ".encoder.layers." in name
        else:
            inside = ".attentions." in name and isinstance(layer, nn.Linear)
            inside = inside and (targets == "transformer" or ".attn" in name)
        if inside:
            chosen.append(name)
    return sorted(chosen)


class AdaptedLayer(nn.Module):
    """What runs beside one layer: trainable factors, and what earlier tasks left."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: no submodule of the network
        self.down: nn.Parameter | None = None  # A (rank, in)
        self.up: nn.Parameter | None = None  # B (out, rank)
        self.alpha = 1.0
        self.trainable: frozenset[str] = frozenset({"A", "B"})
        self.multiplier = 1.0
        self.dropout = self.rank_dropout = self.module_dropout = 0.0
        self.register_buffer("base_up", None, persistent=False)
        self.register_buffer("base_down", None, persistent=False)
        self._handle = layer.register_forward_hook(self._add)

    @property
    def layer(self) -> nn.Module:
        """The trainer's own layer."""
        return self._layer[0]

    @property
    def kernel(self) -> Kernel | None:
        """Of a convolution."""
        return layer_kernel(self.layer)

    def set_factors(self, factors: Factors, trainable: frozenset[str]) -> None:
        """Start training from these; the alpha is theirs."""
        if factors.shape != layer_shape(self.layer):
            raise LineageError(
                f"factors of {factors.shape} do not fit a layer of {layer_shape(self.layer)}; they "
                "were made for another base."
            )
        self.alpha, self.trainable = factors.alpha, trainable
        self.down = nn.Parameter(factors.down.clone())
        self.up = nn.Parameter(factors.up.clone())
        self.freeze_untrainable()

    def freeze_untrainable(self) -> None:
        """requires_grad as the strategy wants it."""
        if self.down is not None and self.up is not None:
            self.down.requires_grad_("A" in self.trainable)
            self.up.requires_grad_("B" in self.trainable)

    def factors(self) -> Factors | None:
        """The factors as a value: CPU, fp32, copied; None if nothing trains here."""
        if self.down is None or self.up is None:
            return None
        down, up = self.down.detach().clone(), self.up.detach().clone()
        return Factors(down, up, self.alpha, self.kernel)

    def set_base(self, entry: Entry) -> None:
        """Put D under the training: fused, or beside a half-precision layer."""
        if entry.shape != layer_shape(self.layer):
            raise LineageError(
                f"the parent changes a layer of {entry.shape}, the base has "
                f"{layer_shape(self.layer)} there; chain runs on one base."
            )
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        if isinstance(entry, Stacked) and weight.dtype is not torch.float32:
            self.base_up, self.base_down = entry.up.clone(), entry.down.clone()
        else:
            fuse(weight, entry)

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if self.base_down is not None:
            output = output + self._widen(self._narrow(x, self.base_down), self.base_up).to(output)
        skipped = (
            self.training and self.module_dropout > 0 and bool(torch.rand(()) < self.module_dropout)
        )
        if self.down is None or self.up is None or self.multiplier == 0 or skipped:
            return output
        hidden = self._narrow(x, self.down)
        scale = self.multiplier * self.alpha / self.down.shape[0]
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout > 0:
            hidden, scale = self._drop_ranks(hidden), scale / (1 - self.rank_dropout)
        return output + (self._widen(hidden, self.up) * scale).to(output)

    def _narrow(self, x: Tensor, down: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            weight = down.view(down.shape[0], -1, *layer.kernel_size)
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
        return F.linear(x, down)

    def _widen(self, hidden: Tensor, up: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(hidden, up.view(*up.shape, 1, 1))
        return F.linear(hidden, up)

    def _drop_ranks(self, hidden: Tensor) -> Tensor:
        """Whole ranks of single examples, as networks.lora does."""
        channel = 1 if isinstance(self.layer, nn.Conv2d) else hidden.dim() - 1
        shape = [1] * hidden.dim()
        shape[0], shape[channel] = hidden.shape[0], hidden.shape[channel]
        return hidden * (torch.rand(shape, device=hidden.device) > self.rank_dropout).to(hidden)

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()


def fuse(weight: nn.Parameter, entry: Entry) -> None:
    """W' = round(W + D), added in fp32, rounded once, in place."""
    with torch.no_grad():
        flat = weight.detach().float().reshape(entry.shape)
        weight.copy_(add_delta(flat, entry).reshape(weight.shape).to(weight.dtype))
