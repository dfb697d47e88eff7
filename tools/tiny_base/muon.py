"""Muon for matrices, AdamW for the rest, with an average of the weights: small, and made to resume.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, then the nearest
orthogonal matrix of the update by five quintic Newton-Schulz steps. Convolutions are flattened to
(out, in * k * k); matrices of one shape are orthogonalised together. State is a flat dict of named
tensors, so that a checkpoint is one safetensors file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from tiny_base.precision import fast_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WIDE = 3  # ratio of sides
MOMENTUM = 0.95
BETAS = (0.9, 0.99)
EPS = 1e-8


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> the same with singular values near 1, in `fast_dtype`.

    In fp32, matrices at least WIDE times as long as wide go through the polynomials of their small
    Gram matrix, which commute: two products with the long side instead of two a step.
    """
    a, b, c = NEWTON_SCHULZ
    x = update.to(fast_dtype())
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and x.shape[-1] >= WIDE * x.shape[-2]:
        x = _newton_schulz_of_gram(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def _newton_schulz_of_gram(gram: Tensor, steps: int) -> Tensor:
    """The (n, rows, rows) factor that the steps amount to."""
    a, b, c = NEWTON_SCHULZ
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    whole = identity.expand_as(gram)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole


class MuonAdamW:
    """Optimises named parameters; `average` holds their exponential moving average."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        muon_lr: float,
        adamw_lr: float,
        average_decay: float,
        adamw_only: tuple[str, ...] = (),
    ) -> None:
        """`adamw_only`: parts of names whose matrices are AdamW's too: embeddings, outer layers."""
        self.parameters = dict(parameters)
        self.muon_lr, self.adamw_lr, self.average_decay = muon_lr, adamw_lr, average_decay
        self.steps = 0
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._momentum: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._others: list[str] = []
        for name, p in self.parameters.items():
            self._momentum[name] = torch.zeros_like(p)
            if p.ndim < 2 or any(part in name for part in adamw_only):
                self._second[name] = torch.zeros_like(p)
                self._others.append(name)
            else:
                self._groups[(p.shape[0], p[0].numel())].append(name)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update with `share` of both learning rates, then the average; clears gradients."""
        self.steps += 1
        for shape, names in self._groups.items():
            self._step_muon(shape, names, share * self.muon_lr)
        self._step_adamw(share * self.adamw_lr)
        # a young average follows faster, so that it does not remember the random start
        decay = min(self.average_decay, (1 + self.steps) / (10 + self.steps))
        weights: list[Tensor] = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, average and moments, flat."""
        state: dict[str, Tensor] = {}
        for prefix, tensors in self._tables().items():
            state |= {f"{prefix}/{name}": tensor.detach() for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore what `state_dict` gave; KeyError for a foreign state."""
        for prefix, tensors in self._tables().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{prefix}/{name}"])
        self.steps = steps

    def _tables(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "weight": self.parameters,
            "average": self.average,
            "momentum": self._momentum,
            "second": self._second,
        }

    def _step_muon(self, shape: tuple[int, int], names: list[str], lr: float) -> None:
        updates = []
        for name in names:
            gradient = self._gradient(name)
            momentum = self._momentum[name].lerp_(gradient, 1 - MOMENTUM)
            updates.append(gradient.lerp(momentum, MOMENTUM).reshape(shape))  # Nesterov
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for name, update in zip(names, orthogonalise(torch.stack(updates)), strict=True):
            p = self.parameters[name]
            p.add_(update.float().reshape(p.shape), alpha=-lr * scale)

    def _step_adamw(self, lr: float) -> None:
        if not self._others:
            return
        parameters: list[Tensor] = [self.parameters[name] for name in self._others]
        gradients = [self._gradient(name) for name in self._others]
        first = [self._momentum[name] for name in self._others]
        second = [self._second[name] for name in self._others]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        correction = (1 - BETAS[1] ** self.steps) ** 0.5
        size = lr * correction / (1 - BETAS[0] ** self.steps)
        roots = torch._foreach_sqrt(second)
        torch._foreach_add_(roots, EPS)
        torch._foreach_addcdiv_(parameters, first, roots, -size)

    def _gradient(self, name: str) -> Tensor:
        p = self.parameters[name]
        return torch.zeros_like(p) if p.grad is None else p.grad
