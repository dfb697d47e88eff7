"""All factors of an adapter side by side in one tensor, each at a multiple of 256 entries.

One cast then serves every layer of a step, and an optimizer that works entry by entry, or in blocks
of 256 as bitsandbytes' 8-bit ones do (arXiv 2110.02861), gives for the whole what it gives for each
part: its kernel runs once instead of some thousand times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # entries; a multiple of the block of 8-bit optimizers


class FlatFactors:
    """Parameters of one device and type, moved into one tensor; they stay parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.parameters]
        first = self.parameters[0]
        self.values = torch.zeros(sum(self.sizes), dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.views(self.values), strict=True):
                view.copy_(parameter)
                parameter.data = view

    def views(self, values: Tensor) -> list[Tensor]:
        """`values`, laid out as the flat tensor, in the parameters' shapes."""
        parts = torch.split(values, self.sizes)
        pairs = zip(parts, self.parameters, strict=True)
        return [part[: p.numel()].view(p.shape) for part, p in pairs]

    def rounded(self, dtype: torch.dtype) -> list[Tensor]:
        """The parameters as they are now in another type: fresh tensors, without gradients."""
        return self.views(self.values.detach().to(dtype))


@dataclass(frozen=True)
class Stretch:
    """Neighbours in the flat tensor that an optimizer takes as one parameter."""

    joined: nn.Parameter
    first: int  # index of the first neighbour
    count: int


class JoinedGroups:
    """Optimizer groups in which neighbours of a group are one parameter.

    A step opens their gradients before its first backward pass, collects them before the optimizer
    looks, and clears them behind it. A parameter of fewer than `least` entries stays alone.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], flat: FlatFactors, least: int = 4096
    ) -> None:
        self.flat = flat
        self.stretches: list[Stretch] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self.groups = [{**group, "params": self._join(group["params"], least)} for group in groups]

    def _join(self, parameters: Sequence[nn.Parameter], least: int) -> list[nn.Parameter]:
        place = {id(p): i for i, p in enumerate(self.flat.parameters) if p.numel() >= least}
        alone = [p for p in parameters if id(p) not in place]
        indices = sorted(place[id(p)] for p in parameters if id(p) in place)
        joined = []
        while indices:
            count = 1
            while count < len(indices) and indices[count] == indices[0] + count:
                count += 1
            joined.append(self._make_run(indices[0], count))
            indices = indices[count:]
        return [*joined, *alone]

    def _make_run(self, first: int, count: int) -> nn.Parameter:
        start, length = sum(self.flat.sizes[:first]), sum(self.flat.sizes[first : first + count])
        joined = nn.Parameter(self.flat.values[start : start + length])
        self.stretches.append(Stretch(joined, first, count))
        return joined

    @torch.no_grad()
    def open(self) -> None:
        """Zero gradients side by side, which backward passes add to."""
        self._views = []
        for run in self.stretches:
            parameters = self.flat.parameters[run.first : run.first + run.count]
            sizes = self.flat.sizes[run.first : run.first + run.count]
            run.joined.grad = torch.zeros_like(run.joined)
            for part, p in zip(torch.split(run.joined.grad, sizes), parameters, strict=True):
                p.grad = part[: p.numel()].view(p.shape)
                self._views.append((p, p.grad))

    @torch.no_grad()
    def collect(self) -> None:
        """What somebody has put in a gradient's place goes where the optimizer looks."""
        for parameter, view in self._views:
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
            parameter.grad = view

    def clear(self) -> None:
        """No gradients, in the parameters too."""
        for run in self.stretches:
            run.joined.grad = None
        for parameter, _ in self._views:
            parameter.grad = None
        self._views = []
