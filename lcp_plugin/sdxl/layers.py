"""LoRA layers and deltas on a live model: the base's own modules stay in place.

y = W x + D_branch x + scale B A x. A forward hook on each adapted layer adds the last two terms, on
a plain linear layer a forward of its own; taking it away gives back the base to the bit. In
training, W x and the factors' part are then one node of the graph (`AdaptedLinear`).

The carried delta is fused: W' = round(W_0 + D), added in fp32 and rounded once, always from
untouched weights (W + D - D is not W), which wait on the CPU meanwhile. That costs no step time and
no memory, however many tasks the chain has. A half-precision base is rounded stochastically
(`sdxl.rounding`), so that no update is lost in it. `carry_as = branch` runs D beside the weights
instead, in their type: rounded by itself, not against W (0.2% in bf16), for the time and memory of
its factors, or of one more matrix where it is dense (MagMax).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcp_plugin.adapter import Adapter, Factors, Kernel
from lcp_plugin.delta import Delta, Entry, Stacked
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.keys import canonical
from lcp_plugin.hooks import Weights
from lcp_plugin.sdxl.adapted_linear import AdaptedLinear
from lcp_plugin.sdxl.flat_factors import FlatFactors
from lcp_plugin.sdxl.rounding import FuseError, add_delta, measure_fuse, round_stochastically

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def find_layers(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All linear and convolution layers as `component.path` -> module."""
    return {
        canonical(f"{component}.{name}"): module
        for component, root in components.items()
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # kohya's text-encoder layers


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
    """The layers that a run adapts: `attention`, the paper's 560 on SDXL; `transformer`, kohya's
    722.
    """
    unet = [name for name in layers if name.startswith("unet.") and ".attentions." in name]
    if targets == "transformer":
        return [name for name in unet if isinstance(layers[name], nn.Linear)]
    return [name for name in unet if ".attn" in name and name.endswith(ATTENTION)]


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) with a convolution flattened to (out, in*k*k)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def layer_kernel(layer: nn.Module) -> Kernel | None:
    """(kh, kw) of a convolution, None of a linear layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size[0], layer.kernel_size[1]
    return None


class LoraPair(nn.Module):
    """The trainable factors of one layer."""

    def __init__(self, factors: Factors, trainable: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.to(dtype, copy=True), requires_grad="A" in trainable)
        self.up = nn.Parameter(factors.up.to(dtype, copy=True), requires_grad="B" in trainable)
        self.alpha, self.scale, self.kernel = factors.alpha, factors.scale, factors.kernel
        self.rounded: tuple[Tensor, Tensor] | None = None  # A and B in the base's type, this step
        self.dropout = 0.0  # of the layer's input (network_dropout: of A x)
        self.rank_dropout = 0.0
        self.module_dropout = 0.0

    def factors(self) -> Factors:
        """The factors as a value: CPU, fp32, copied."""
        return Factors(
            self.down.detach().clone(), self.up.detach().clone(), self.alpha, self.kernel
        )


@dataclass
class Branch:
    """A frozen, unfused delta of one layer on the device: (up, down) or a matrix."""

    up: Tensor | None
    down: Tensor  # (R, in), or the matrix (out, in) if up is None


def _apply(layer: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
    """matrix applied as the layer applies its weight: a linear map or a convolution."""
    if isinstance(layer, nn.Conv2d):
        weight = matrix.view(matrix.shape[0], -1, *layer.kernel_size)
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, matrix)


def _widen(layer: nn.Module, hidden: Tensor, up: Tensor) -> Tensor:
    """B applied to A x: for a convolution a 1 x 1 one."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(hidden, up.view(*up.shape, 1, 1))
    return F.linear(hidden, up)


class Site:
    """One adapted layer: its untouched weight, what is fused, what runs beside it."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.untouched: Tensor | None = None  # W_0 while something is fused
        self.branch: Branch | None = None
        self.pair: LoraPair | None = None
        self._handle: RemovableHandle | None = None
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            vars(layer)["forward"] = self._forward
        else:  # a convolution, a quantised layer, one that another library has wrapped
            self._handle = layer.register_forward_hook(self._add)

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight as it is now."""
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _forward(self, x: Tensor) -> Tensor:
        """A linear layer's own forward and what is added; in one node where that can be."""
        pair, layer = self.pair, self.layer
        if pair is None or not self._joins(pair, x):
            return self._add(layer, (x,), type(layer).forward(layer, x))
        output: Tensor = AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x, layer.weight, layer.bias, pair.down, pair.up, pair.rounded, pair.scale
        )
        return output if self.branch is None else output + self._branch_output(x).to(output.dtype)

    def _joins(self, pair: LoraPair, x: Tensor) -> bool:
        """Whether all products are of the weight's type, by itself or by autocast, and nothing is
        dropped.
        """
        weight, kind = self.layer.weight, x.device.type
        assert isinstance(weight, Tensor)
        cast = torch.is_autocast_enabled(kind)
        return (
            pair.training
            and pair.module_dropout + pair.dropout + pair.rank_dropout == 0
            and weight.dtype is (torch.get_autocast_dtype(kind) if cast else x.dtype)
            and not weight.requires_grad
        )

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.branch is None and self.pair is None:
            return output
        x = args[0]
        if self.branch is not None:
            output = output + self._branch_output(x).to(output.dtype)
        pair = self.pair
        if pair is not None:
            output = output + self._pair_output(pair, x).to(output.dtype)
        return output

    def _branch_output(self, x: Tensor) -> Tensor:
        branch = self.branch
        assert branch is not None
        if branch.down.device != x.device:  # its layer has moved, as text encoders do
            up = None if branch.up is None else branch.up.to(x.device)
            branch = self.branch = Branch(up, branch.down.to(x.device))
        hidden = _apply(self.layer, _match(x, branch.down), branch.down)
        return hidden if branch.up is None else _widen(self.layer, hidden, branch.up)

    def _pair_output(self, pair: LoraPair, x: Tensor) -> Tensor:
        if pair.training and pair.module_dropout > 0 and torch.rand(()) < pair.module_dropout:
            return x.new_zeros(())
        x, down, up = _of_one_type(self.layer, x, pair)
        hidden = _apply(self.layer, x, down)
        scale = pair.scale
        if pair.training and pair.dropout > 0:
            hidden = F.dropout(hidden, pair.dropout)
        if pair.training and pair.rank_dropout > 0:
            hidden, scale = _drop_ranks(self.layer, hidden, pair.rank_dropout, scale)
        if scale != 1.0:  # on A x, which is smaller than the output
            hidden = hidden * scale
        return _widen(self.layer, hidden, up)

    def fuse(self, entry: Entry, measure: bool) -> FuseError:
        """W' = round(W_0 + D), stochastically where the weights are of half precision."""
        if self.untouched is None:
            data = self.weight.data
            self.untouched = data.cpu()
        else:
            data = self.untouched.to(self.weight.device)
        flat = data.detach().float().reshape(entry.shape)
        rounded = round_stochastically(add_delta(flat, entry), data.dtype, self.name)
        self.weight.data = rounded.view(data.shape)
        return measure_fuse(flat, entry, rounded) if measure else FuseError()

    def restore(self) -> None:
        """Back to the untouched weight; no branch."""
        if self.untouched is not None:
            self.weight.data = self.untouched.to(self.weight.device)
            self.untouched = None
        self.branch = None

    def set_branch(self, entry: Entry | None, measure: bool = False) -> FuseError:
        """Runs the delta beside the layer, in the type of its weight."""
        device, dtype = self.weight.device, self.weight.dtype
        if entry is None:
            self.branch = None
            return FuseError()
        if isinstance(entry, Stacked):
            self.branch = Branch(entry.up.to(device, dtype), entry.down.to(device, dtype))
        else:
            self.branch = Branch(None, entry.weight.to(device, dtype))
        if not measure:
            return FuseError()
        if dtype is torch.float32:
            return FuseError(0.0, entry.norm() ** 2)
        kept = self.branch.down.float()
        kept = kept if self.branch.up is None else self.branch.up.float() @ kept
        delta = entry.dense().to(device)
        error = (delta - kept).double()
        missing = float((error * delta).sum())
        return FuseError(float(error.square().sum()), entry.norm() ** 2, missing)

    def remove(self) -> None:
        """Takes the hook away; the layer is as it was."""
        self.restore()
        self.pair = None
        if self._handle is None:
            vars(self.layer).pop("forward", None)
        else:
            self._handle.remove()


def _of_one_type(layer: nn.Module, x: Tensor, pair: LoraPair) -> tuple[Tensor, Tensor, Tensor]:
    """x, A and B in the type that the layer computes in: the wider one of fp32 and x's."""
    if torch.is_autocast_enabled(x.device.type):
        return x, pair.down, pair.up
    return x, pair.down.to(x.dtype), pair.up.to(x.dtype)


def _match(x: Tensor, weight: Tensor) -> Tensor:
    """x in the weight's precision, unless autocast decides."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def _drop_ranks(
    layer: nn.Module, hidden: Tensor, rate: float, scale: float
) -> tuple[Tensor, float]:
    """Drops whole ranks per example, as networks.lora's rank_dropout: the scale makes up for it."""
    channel = 1 if isinstance(layer, nn.Conv2d) else hidden.dim() - 1
    shape = [1] * hidden.dim()
    shape[0], shape[channel] = hidden.shape[0], hidden.shape[channel]
    mask = torch.rand(shape, device=hidden.device) > rate
    return hidden * mask.to(hidden.dtype), scale / (1 - rate)


class AdaptedUNet(nn.Module):
    """A pipeline's UNet (and text encoders) with deltas and one adapter attached by hooks.

    As a module it holds the UNet and the adapter's factors, so that it can be prepared for several
    processes;
    `forward` is the UNet's.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.unet = components["unet"]
        self.layers = find_layers(components)
        self.pairs = nn.ModuleDict()
        self._sites: dict[str, Site] = {}
        self._base = Delta()
        self._start = Adapter()
        self._carry = Delta()
        self._set: tuple[str, dict[str, float]] | None = None  # how the base was last set
        self.pair_of: dict[str, LoraPair] = {}
        self.flat: FlatFactors | None = None  # the UNet's factors
        self.plain = False  # the base computes in its own type: no autocast
        self.shares_casts = True  # the factors are cast once a step, for all layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet, adapted."""
        self._round_factors()
        if not self.plain:
            return self.unet(*args, **kwargs)
        with torch.autocast(str(self.unet.device.type), enabled=False):
            return self.unet(*args, **kwargs)

    def _round_factors(self) -> None:
        """The factors as they are now, in the type that a half-precision base computes in."""
        if self.flat is None or not (self.training and self.shares_casts):
            return
        names = [name for name in self.pair_of if name.startswith("unet.")]
        dtype = self._sites[names[0]].weight.dtype
        if dtype is self.flat.values.dtype:
            return
        views = iter(self.flat.rounded(dtype))
        for name in names:
            self.pair_of[name].rounded = next(views), next(views)

    def forget_rounded(self) -> None:
        """Frees what `forward` cast: the factors are about to change."""
        for pair in self.pair_of.values():
            pair.rounded = None

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            if name not in self.layers:
                raise LineageError(
                    f"the parent changes {name}, which this base does not have; chain runs on "
                    f"one base."
                )
            self._sites[name] = Site(name, self.layers[name])
        return self._sites[name]

    def set_base(
        self, delta: Delta, carry_as: str = "auto", measure: bool = True
    ) -> dict[str, float]:
        """Puts the model on W_0 + delta, frozen.

        Returns:
            fused, branched: numbers of layers, and `FuseError.shares` over all of them.
        Raises:
            LineageError: a module or shape that the base does not have.
        """
        if delta is self._base and self._set is not None and self._set[0] == carry_as:
            return dict(self._set[1])  # as a boundary leaves it for the next task
        self.check_fits(delta)
        for site in self._sites.values():
            site.restore()
        self._base = delta
        error, fuses = FuseError(), carry_as != "branch"
        for name, entry in delta.items():
            site = self._site(name)
            part = site.fuse(entry, measure) if fuses else site.set_branch(entry, measure)
            error = error + part
        fused = len(delta) if fuses else 0
        facts = {"fused": fused, "branched": len(delta) - fused, **error.shares()}
        self._set = (carry_as, facts) if measure else None
        return dict(facts)

    def check_fits(self, values: Mapping[str, Any]) -> None:
        """Raises LineageError if a delta or adapter has a module or shape that the base lacks."""
        for name, value in values.items():
            if name not in self.layers:
                raise LineageError(
                    f"the parent changes {name}, which this base does not have; chain runs on "
                    f"one base."
                )
            if value.shape != layer_shape(self.layers[name]):
                raise LineageError(
                    f"the parent's {name} is {value.shape}, the base's "
                    f"{layer_shape(self.layers[name])}; "
                    "chain runs on one base."
                )

    def attach(
        self,
        adapter: Adapter,
        trainable: frozenset[str] = frozenset({"A", "B"}),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Puts the adapter's factors on the layers as parameters, on each layer's device."""
        self.check_fits(adapter)
        self.detach()
        self._start = adapter
        for name, factors in adapter.items():
            site = self._site(name)
            pair = LoraPair(factors, trainable, dtype).to(site.weight.device)
            site.pair = self.pair_of[name] = pair
            self.pairs[name.replace(".", "/")] = pair
        pairs = [pair for name, pair in self.pair_of.items() if name.startswith("unet.")]
        parameters = [parameter for pair in pairs for parameter in (pair.down, pair.up)]
        self.flat = FlatFactors(parameters) if parameters else None

    def detach(self) -> None:
        """Takes the adapter off."""
        for name in self.pair_of:
            self._sites[name].pair = None
        self.pair_of, self.flat = {}, None
        self.pairs = nn.ModuleDict()

    def trained(self) -> Adapter:
        """The factors as they are now, as a value."""
        return Adapter({name: pair.factors() for name, pair in self.pair_of.items()})

    def set_carry(self, total: Delta) -> None:
        """What `using("carry")` shows: W_0 + total. Raises LineageError where that does not fit."""
        self.check_fits(total)
        self._carry = total

    def base_delta(self, name: str) -> Tensor | None:
        """The frozen base delta of a layer on its device, (out, in); None where it is zero."""
        if name not in self._base:
            return None
        weight = self.layers[name].weight
        assert isinstance(weight, Tensor)
        return self._base[name].dense().to(weight.device)

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """The model under other weights for a while: "trained", "start", "carry" or "base"."""
        if weights == "trained":
            yield
            return
        if weights == "carry" and self._carry is self._base:
            with self._without_pairs():
                yield
            return
        shown = {"base": Delta(), "carry": self._carry}.get(weights)
        with self._without_pairs():
            if shown is not None:
                with self._showing(shown):
                    yield
            else:
                with self._beside(Delta.of(self._start)):  # pairs stay away until it ends
                    yield

    @contextmanager
    def _without_pairs(self) -> Iterator[None]:
        pairs = {name: site.pair for name, site in self._sites.items()}
        try:
            for site in self._sites.values():
                site.pair = None
            yield
        finally:
            for name, pair in pairs.items():
                self._sites[name].pair = pair

    @contextmanager
    def _showing(self, delta: Delta) -> Iterator[None]:
        """Untouched weights with `delta` beside them; fused weights come back unchanged after."""
        for name in delta:
            self._site(name)  # a carry may change layers that this task does not
        kept = {name: (site.weight.data, site.branch) for name, site in self._sites.items()}
        try:
            for name, site in self._sites.items():
                if site.untouched is not None:
                    site.weight.data = site.untouched.to(site.weight.device)
                site.set_branch(delta.get(name))
            yield
        finally:
            for name, (data, branch) in kept.items():
                self._sites[name].weight.data = data
                self._sites[name].branch = branch

    @contextmanager
    def _beside(self, delta: Delta) -> Iterator[None]:
        """The base of the task with `delta` in the adapter's place."""
        try:
            for name, entry in delta.items():
                site = self._sites[name]
                factors = Delta({name: entry}).factors(name)
                pair = LoraPair(factors, frozenset(), torch.float32).to(site.weight.device)
                site.pair = pair.eval()
            yield
        finally:
            for name in delta:
                self._sites[name].pair = None

    def release(self) -> None:
        """Takes every hook, branch and fused weight away: the base, to the bit."""
        self.detach()
        for site in self._sites.values():
            site.remove()
        self._sites, self._set = {}, None
        self._base = self._carry = Delta()
