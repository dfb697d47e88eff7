"""Small adapters, deltas and tasks for tests, and their updates in float64, independently."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, Stacked
from lcp_plugin.hooks import Carry, Strategy
from lcp_plugin.tasks import Task

SHAPES: Mapping[str, tuple[int, int]] = {"unet.a": (3, 4), "unet.b": (4, 3), "unet.wide": (40, 50)}


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """SDXL's betas: linear in their square roots   # (steps,), fp64."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(
    shape: tuple[int, int], rank: int = 2, alpha: float = 2.0, seed: int = 0
) -> Factors:
    generator = seeded(seed)
    return Factors(
        torch.randn(rank, shape[1], generator=generator),
        torch.randn(shape[0], rank, generator=generator),
        alpha,
    )


def random_adapter(
    seed: int,
    rank: int = 2,
    alpha: float = 3.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> Adapter:
    """Trained factors: neither half is zero."""
    return Adapter(
        {
            name: random_factors(shape, rank, alpha, 100 * seed + i)
            for i, (name, shape) in enumerate(shapes.items())
        }
    )


def dense_update(factors: Factors) -> Tensor:
    """(alpha / rank) B A in float64   # (out, in)."""
    return factors.alpha / len(factors.down) * factors.up.double() @ factors.down.double()


def dense_updates(adapter: Adapter) -> dict[str, Tensor]:
    return {name: dense_update(factors) for name, factors in adapter.items()}


def dense_delta(delta: Delta) -> dict[str, Tensor]:
    """Every module as a float64 matrix."""
    found = {}
    for name, entry in delta.items():
        if isinstance(entry, Stacked):
            found[name] = entry.up.double() @ entry.down.double()
        else:
            found[name] = entry.weight.double()
    return found


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum of two sets of matrices; a missing one is zero."""
    return {n: a[n] + b[n] if n in a and n in b else a.get(n, b.get(n)) for n in {*a, *b}}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal modules, and entries to fp32 rounding."""
    assert set(got) == set(expected)
    for name in got:
        size = max(1.0, float(expected[name].abs().max()))
        error = float((got[name].double() - expected[name].double()).abs().max())
        assert error <= 3e-6 * size, (name, error)


def make_spec(
    index: int = 1,
    rank: int = 2,
    alpha: float = 3.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> AdapterSpec:
    return AdapterSpec(shapes=shapes, rank=rank, alpha=alpha, seed=1000 + index)


def make_task(index: int = 1) -> Task:
    return Task(index, f"task{index}", "object", f"sks{index} thing", ("a {concept}",))


def all_tensors(value: Adapter | Delta | Carry) -> list[Tensor]:
    """Every tensor in a value that crosses the boundary."""
    if isinstance(value, Carry):
        return all_tensors(value.delta) + all_tensors(value.adapter or Adapter())
    tensors: list[Tensor] = []
    for entry in value.values():
        parts = (getattr(entry, field, None) for field in ("up", "down", "weight"))
        tensors += [part for part in parts if isinstance(part, Tensor)]
    return tensors


def learn(
    strategy: Strategy, tasks: int, carry: Carry | None = None, first: int = 1, rank: int = 2
) -> tuple[Carry, list[Adapter]]:
    """`tasks` boundaries; training is a known change of the start's factors."""
    carry, updates = carry or Carry(), []
    for index in range(first, first + tasks):
        task, spec = make_task(index), make_spec(index, rank=rank)
        start = strategy.begin_task(task, carry, spec)
        trained = pretend_training(start.adapter, index)
        updates.append(trained)
        carry = strategy.end_task(task, carry, trained)
    return carry, updates


def pretend_training(start: Adapter, seed: int) -> Adapter:
    """The start plus a known random step on both factors."""
    moved = {}
    for i, (name, f) in enumerate(start.items()):
        generator = seeded(7000 + 10 * seed + i)
        down = f.down + 0.3 * torch.randn(f.down.shape, generator=generator)
        up = f.up + torch.randn(f.up.shape, generator=generator)
        moved[name] = Factors(down, up, f.alpha, f.kernel)
    return Adapter(moved)
