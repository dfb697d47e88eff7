"""The layers of an SDXL model under our names, and which of them a run adapts.

Our names are diffusers' with the component in front: `unet.down_blocks.1...`, `text_encoder...`.
sd-scripts' own UNet has SGM's names, its text encoders are transformers'; each layer is found under
ours all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lcp_plugin.adapter import AdapterSpec, Kernel
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.keys import PREFIXES, canonical, from_sgm, is_module

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # kohya's text-encoder layers


def find_layers(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All linear and convolution layers as `component.path` -> module."""
    return {
        canonical(f"{component}.{name}"): module
        for component, root in components.items()
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def name_layers(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The layers of sd-scripts' models; the UNet has SGM's names or diffusers'."""
    layers: dict[str, nn.Module] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            dotted = name if is_module(f"unet.{name}") else from_sgm(name.replace(".", "_"))
            if dotted:
                layers[f"unet.{dotted}"] = layer
    for prefix, encoder in zip(PREFIXES[1:], text_encoders, strict=False):
        for name, layer in encoder.named_modules():
            ours = canonical(prefix + name)
            if isinstance(layer, nn.Linear) and is_module(ours):
                layers[ours] = layer
    return layers


def spec_of_layers(
    layers: Mapping[str, nn.Module], rank: int, alpha: float, seed: int
) -> AdapterSpec:
    """A fresh adapter of these layers, all of one rank and alpha."""
    kernels = {name: layer_kernel(layer) for name, layer in layers.items()}
    return AdapterSpec(
        shapes={name: layer_shape(layer) for name, layer in layers.items()},
        rank=rank,
        alpha=alpha,
        seed=seed,
        kernels={name: kernel for name, kernel in kernels.items() if kernel is not None},
    )


def choose_text_targets(layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers of both text encoders that kohya's networks.lora adapts: 264 on SDXL."""
    return [
        name
        for name in layers
        if name.startswith(("text_encoder.", "text_encoder_2."))
        and ".encoder.layers." in name
        and name.endswith(TEXT)
    ]


def choose_targets(layers: Mapping[str, nn.Module], targets: str) -> list[str]:
    """The layers that a run adapts: `attention`, the paper's 560; `transformer`, kohya's 722."""
    unet = [name for name in layers if name.startswith("unet.") and ".attentions." in name]
    if targets == "transformer":
        return [name for name in unet if isinstance(layers[name], nn.Linear)]
    return [name for name in unet if ".attn" in name and name.endswith(ATTENTION)]


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The layer's weight as it is now."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) with a convolution flattened to (out, in*k*k)."""
    weight = weight_of(layer)
    return weight.shape[0], weight[0].numel()


def layer_kernel(layer: nn.Module) -> Kernel | None:
    """(kh, kw) of a convolution, None of a linear layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size[0], layer.kernel_size[1]
    return None


def check_fits(
    layers: Mapping[str, nn.Module], values: Mapping[str, Any], what: str = "the parent"
) -> None:
    """Raises LineageError if a delta or adapter has a module or shape that the base lacks."""
    for name, value in values.items():
        if name not in layers:
            raise LineageError(
                f"{what} changes {name}, which this base does not have; chain runs on one base."
            )
        if value.shape != layer_shape(layers[name]):
            raise LineageError(
                f"{what}'s {name} is {value.shape}, the base's {layer_shape(layers[name])}; "
                "chain runs on one base."
            )
