"""W_0 + D formed in fp32 and rounded once to the type of the weights.

To the nearest number, a half-precision base swallows small updates (bf16 loses 20 to 60% of ||D||
of a finished task, nearly all of a young one). Stochastic rounding (arXiv 1502.02551) goes up with
the probability of what lies above the lower neighbour: each weight is right in the mean, so that
the sums in W x keep D, and the noise that stays, a fraction of a last place in each weight, is that
of W's own type. The dither u in [0, 1) of each entry is a hash of its place and of the module's
name: the same on every device and for every D, so that a delta which grows from task to task moves
each weight at most once across each neighbour, and one that is zero leaves W_0 to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcp_plugin.delta import Entry, Stacked
from lcp_plugin.sdxl.devices import widen
from lcp_plugin.seeds import derive_seed

BLOCK = 128 * 1280  # entries measured at once: 0.7 MB, which a core's own cache holds
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}  # bits behind the leading one
FLOAT16_SMALLEST = 2.0**-14  # normal number; below it float16 has steps of 2^-24


def round_stochastically(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """fp32 values of a module rounded up or down at random, right in the mean   # as given, dtype.

    A number of `dtype` stays itself. Infinite and NaN values stay as they are.
    """
    if dtype not in MANTISSA:
        return values.to(dtype)
    drop = 23 - MANTISSA[dtype]  # bits of fp32's mantissa that do not fit
    dither = _dither(values.shape, name, values.device) >> (32 - drop)  # in [0, 2^drop)
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + dither) & -(1 << drop)).to(torch.int32).view(torch.float32)
    if dtype is torch.float16:  # subnormal there: the same, counted in steps of 2^-24
        small = values.abs() < FLOAT16_SMALLEST
        steps = torch.floor(values.abs() * 2.0**24 + dither.float() / (1 << drop)) * 2.0**-24
        rounded = torch.where(small, steps.copysign(values), rounded)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)


def _dither(shape: torch.Size, name: str, device: torch.device) -> Tensor:
    """32 random bits for each entry, as int64: murmur3's finaliser over its place   # shape."""
    mask = 0xFFFFFFFF
    h = torch.arange(shape.numel(), device=device, dtype=torch.int64)
    h = (h * 0x9E3779B1 + derive_seed("rounding", name) % (1 << 32)) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return (h ^ (h >> 16)).view(shape)


def add_delta(weight: Tensor, entry: Entry) -> Tensor:
    """W_0 + D in fp32 (out, in), in one pass; neither argument is changed."""
    if isinstance(entry, Stacked):
        return torch.addmm(weight, entry.up.to(weight.device), entry.down.to(weight.device))
    return weight + entry.weight.to(weight.device)


@dataclass(frozen=True)
class FuseError:
    """What putting D into weights of few bits did, as squares that add up over modules.

    Numbers, or scalars on the device where the weights are: waiting for each would cost more than
    the sums themselves.
    """

    lost: float | Tensor = 0.0  # ||W' - W_0 - D||^2
    size: float | Tensor = 0.0  # ||D||^2
    missing: float | Tensor = 0.0  # <D - (W' - W_0), D>: what of D is not there, noise aside
    weight: float | Tensor = 0.0  # ||W_0||^2

    def __add__(self, other: FuseError) -> FuseError:
        return FuseError(
            _plus(self.lost, other.lost),
            _plus(self.size, other.size),
            _plus(self.missing, other.missing),
            _plus(self.weight, other.weight),
        )

    def shares(self) -> dict[str, float]:
        """rounding_share ||W' - W_0 - D|| / ||D||, missing_share of D along itself, and
        noise_share ||W' - W_0 - D|| / ||W_0||; 0 where nothing was fused.
        """
        lost, size = float(self.lost), float(self.size)
        missing, weight = float(self.missing), float(self.weight)
        return {
            "rounding_share": math.sqrt(lost / size) if size else 0.0,
            "missing_share": abs(missing) / size if size else 0.0,
            "noise_share": math.sqrt(lost / weight) if weight else 0.0,
        }


def _plus(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """Their sum; where they lie on two devices, as text encoders wait on the CPU, a number: fp64
    of one must not reach the other.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.device != b.device:
        return float(a) + float(b)
    return a + b


def measure_fuse(weight: Tensor, entry: Entry, rounded: Tensor) -> FuseError:
    """What arrived of D in `rounded`; weight W_0 (out, in) fp32."""
    delta = entry.dense().to(weight.device)
    lost, size = _sum_losses(weight, delta, rounded)
    if rounded.dtype is torch.float32:  # D is there to the last bit of the sum
        return FuseError(lost, size, 0.0, _square_sum(weight))
    missing = (delta - (rounded.float() - weight)).mul_(delta)
    return FuseError(lost, size, widen(missing).sum(), _square_sum(weight))


def rounding_loss(weight: Tensor, entry: Entry, rounded: Tensor) -> tuple[float, float]:
    """||rounded - (W_0 + D)||^2 and ||D||^2; weight (out, in) fp32."""
    lost, size = _sum_losses(weight, entry.dense().to(weight.device), rounded)
    return float(lost), float(size)


def _sum_losses(weight: Tensor, delta: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """W_0 + D is not a number of fp32 itself: Knuth's two-sum gives the part that the sum loses."""
    rows = max(1, BLOCK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    matrices = (torch.split(m, rows) for m in (weight, delta, rounded))
    blocks = [_block_loss(*parts) for parts in zip(*matrices, strict=True)]
    lost, size = (torch.stack(sums).sum() for sums in zip(*blocks, strict=True))
    return lost, size


def _block_loss(weight: Tensor, delta: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    total = weight + delta
    arrived = total - weight
    error = rounded.float() - total
    error -= (weight - (total - arrived)).add_(delta - arrived)  # lost in the sum
    return _square_sum(error), _square_sum(delta)


def _square_sum(values: Tensor) -> Tensor:
    flat = widen(values.reshape(-1))
    return torch.dot(flat, flat)
