"""One adapted layer: y = W x + D_branch x + multiplier scale B A x, the layer itself in place.

A plain linear layer gets a forward of its own, every other one a forward hook; taking it away gives
back the layer to the bit. In training, W x and the factors' part are then one node of the graph
(`AdaptedLinear`). A carried delta is fused into the weight or runs beside it (`AdaptedUNet` says
when). Our trainer and the network for sd-scripts stand on the same sites.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcp_plugin.adapter import Factors
from lcp_plugin.delta import Entry, Stacked
from lcp_plugin.norms import limit_update_norm, update_norm
from lcp_plugin.sdxl.adapted_linear import AdaptedLinear
from lcp_plugin.sdxl.devices import widen
from lcp_plugin.sdxl.layers import weight_of
from lcp_plugin.sdxl.rounding import FuseError, add_delta, measure_fuse, round_stochastically


class LoraPair(nn.Module):
    """The trainable factors of one layer."""

    def __init__(
        self, factors: Factors, trainable: frozenset[str], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.to(dtype, copy=True))
        self.up = nn.Parameter(factors.up.to(dtype, copy=True))
        self.alpha, self.scale, self.kernel = factors.alpha, factors.scale, factors.kernel
        self.multiplier = 1.0  # of the whole update; 0 leaves it out
        self.trainable = trainable
        self.rounded: tuple[Tensor, Tensor] | None = None  # A and B in the base's type, this step
        self.dropout = 0.0  # of the layer's input (network_dropout: of A x)
        self.rank_dropout = 0.0
        self.module_dropout = 0.0
        self.freeze_untrainable()

    def freeze_untrainable(self) -> None:
        """requires_grad as the strategy wants it."""
        self.down.requires_grad_("A" in self.trainable)
        self.up.requires_grad_("B" in self.trainable)

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
        self.untouched: Tensor | None = None  # W_0, on the CPU, while something is fused
        self._waiting: Tensor | None = None  # that copy, kept for the next boundary
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
        return weight_of(self.layer)

    def _forward(self, x: Tensor) -> Tensor:
        """A linear layer's own forward and what is added; in one node where that can be."""
        pair, layer = self.pair, self.layer
        if pair is None or not self._joins(pair, x):
            return self._add(layer, (x,), type(layer).forward(layer, x))
        scale = pair.scale * pair.multiplier
        output: Tensor = AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x, layer.weight, layer.bias, pair.down, pair.up, pair.rounded, scale
        )
        return output if self.branch is None else output + self._branch_output(x).to(output.dtype)

    def _joins(self, pair: LoraPair, x: Tensor) -> bool:
        """Whether nothing is dropped and all products have the weight's type, autocast or not."""
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
        x, pair = args[0], self.pair
        if self.branch is not None:
            output = output + self._branch_output(x).to(output.dtype)
        if pair is not None and pair.multiplier != 0:
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
        scale = pair.scale * pair.multiplier
        if pair.training and pair.dropout > 0:
            hidden = F.dropout(hidden, pair.dropout)
        if pair.training and pair.rank_dropout > 0:
            hidden, scale = _drop_ranks(self.layer, hidden, pair.rank_dropout, scale)
        if scale != 1.0:  # on A x, which is smaller than the output
            hidden = hidden * scale
        return _widen(self.layer, hidden, up)

    def fuse(self, entry: Entry, measure: bool) -> FuseError:
        """W' = round(W_0 + D), stochastically where the weights are of half precision."""
        data, self.branch = self.weight.data, None
        if self.untouched is None:
            self.untouched = self._copy_of(data)
        else:
            data = self.untouched.to(data.device)
        flat = data.detach().float().reshape(entry.shape)
        rounded = round_stochastically(add_delta(flat, entry), data.dtype, self.name)
        self.weight.data = rounded.view(data.shape)
        return measure_fuse(flat, entry, rounded) if measure else FuseError()

    def _copy_of(self, data: Tensor) -> Tensor:
        """W_0 on the CPU: copied at the first boundary, and kept for those that follow."""
        if data.device.type == "cpu":
            return data
        kept = self._waiting
        return kept if kept is not None and kept.dtype is data.dtype else data.cpu()

    def restore(self) -> None:
        """Back to the untouched weight; no branch."""
        if self.untouched is not None:
            self.weight.data = self.untouched.to(self.weight.device)
            self._waiting, self.untouched = self.untouched, None
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
        error = widen(delta - kept)
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


def fuse_for_good(
    name: str, layer: nn.Module, entry: Entry, dtype: torch.dtype | None = None
) -> None:
    """W' = round(W + D), as `Site.fuse`, where nothing will ask for W again.

    Args:
        dtype: of the weight afterwards; None: as it was.
    """
    weight = weight_of(layer)
    flat = weight.detach().float().reshape(entry.shape)
    rounded = round_stochastically(add_delta(flat, entry), dtype or weight.dtype, name)
    weight.data = rounded.view(weight.shape)


@torch.no_grad()
def limit_norms(pairs: Iterable[LoraPair], largest: float) -> list[tuple[float, bool]]:
    """scale_weight_norms: no update is larger than `largest`.

    Both factors shrink alike; where one of them is frozen, the other takes all of it.

    Returns:
        of each pair its norm afterwards, and whether it was larger.
    """
    return [_limit_norm(pair, largest) for pair in pairs]


def _limit_norm(pair: LoraPair, largest: float) -> tuple[float, bool]:
    if pair.down.requires_grad and pair.up.requires_grad:
        return limit_update_norm(pair.down, pair.up, pair.scale, largest)
    norm = float(update_norm(pair.down, pair.up, pair.scale))
    if norm <= largest:
        return norm, False
    (pair.up if pair.up.requires_grad else pair.down).mul_(largest / norm)
    return largest, True
