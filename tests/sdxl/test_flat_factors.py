"""Factors side by side in one tensor: what an 8-bit optimizer makes of them, and half layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_values import seeded

from lcp_plugin.sdxl.adapted_linear import AdaptedLinear
from lcp_plugin.sdxl.flat_factors import FlatFactors, JoinedGroups

SHAPES = ((8, 640), (320, 17), (3, 7), (4, 1030))  # one of them below bitsandbytes' 4096 entries


def make_factors() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(*s, generator=seeded(i))) for i, s in enumerate(SHAPES)]


def train(optimizer: Any, factors: list[nn.Parameter], joined: JoinedGroups | None) -> None:
    for step in range(4):
        if joined is not None:
            joined.open()
        for number, factor in enumerate(factors):
            factor.grad = torch.randn(factor.shape, generator=seeded(100 * step + number))
        if joined is not None:
            joined.collect()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if joined is not None:
            joined.clear()
            assert all(factor.grad is None for factor in factors[:2])


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_joined_factors_train_as_each_alone_to_the_bit(name: str) -> None:
    import bitsandbytes

    alone, together = make_factors(), make_factors()
    make = getattr(bitsandbytes.optim, name)
    train(make([{"params": alone, "lr": 1e-2}], weight_decay=0.1), alone, None)
    joined = JoinedGroups([{"params": together, "lr": 1e-2}], FlatFactors(together))
    assert len(joined.groups[0]["params"]) == 3  # two neighbours, the small one, one behind it
    train(make(joined.groups, weight_decay=0.1), together, joined)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_groups_of_other_rates_are_joined_each_by_itself() -> None:
    factors = make_factors()
    groups = [{"params": factors[::2], "lr": 1.0}, {"params": factors[1::2], "lr": 2.0}]
    joined = JoinedGroups(groups, FlatFactors(factors), least=1)
    assert [len(group["params"]) for group in joined.groups] == [2, 2]
    assert [group["lr"] for group in joined.groups] == [1.0, 2.0]


def test_a_factor_without_a_gradient_gets_zeros() -> None:
    factors = make_factors()[:2]
    joined = JoinedGroups([{"params": factors}], FlatFactors(factors))
    joined.open()
    (factors[0].sum() + factors[0].sum()).backward()  # adds to what is there
    joined.collect()
    assert factors[1].grad is not None
    assert not factors[1].grad.any()
    assert factors[0].grad is not None
    assert bool((factors[0].grad == 2).all())
    gradient = joined.groups[0]["params"][0].grad
    assert float(gradient.sum()) == 2 * factors[0].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_layer_is_as_near_to_float64_as_its_parts_are(dtype: torch.dtype) -> None:
    x, weight, bias, down, up = (
        torch.randn(*shape, generator=seeded(n)) * 0.1
        for n, shape in enumerate(((3, 50, 64), (48, 64), (48,), (8, 64), (48, 8)))
    )
    half_x, half_weight, half_bias = (t.to(dtype) for t in (x, weight, bias))

    def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        upstream = torch.randn(output.shape, generator=seeded(9)).to(output.dtype)
        return torch.autograd.grad(output, inputs, upstream)

    wide = [t.double().requires_grad_() for t in (half_x, down, up)]
    exact = wide[0] @ half_weight.double().T + half_bias.double()
    exact = exact + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    upstream = torch.randn(exact.shape, generator=seeded(9)).to(dtype).double()
    wanted = torch.autograd.grad(exact, wide, upstream)
    inputs = [half_x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in (down, up))]
    node: Any = AdaptedLinear
    joined = node.apply(inputs[0], half_weight, half_bias, inputs[1], inputs[2], None, 0.5)
    parts = torch.nn.functional.linear(inputs[0], half_weight, half_bias)
    hidden = torch.nn.functional.linear(inputs[0], inputs[1].to(dtype)) * 0.5
    parts = parts + torch.nn.functional.linear(hidden, inputs[2].to(dtype))

    def error(found: Tensor, right: Tensor) -> float:
        return float((found.detach().double() - right.detach()).norm() / right.detach().norm())

    step = torch.finfo(dtype).eps
    assert error(joined, exact) <= error(parts, exact) + step / 8
    ours, theirs = gradients(joined, *inputs), gradients(parts, *inputs)
    assert [g.dtype for g in ours] == [dtype, torch.float32, torch.float32]
    for one, other, right in zip(ours, theirs, wanted, strict=True):
        assert error(one, right) <= error(other, right) + step / 8


def test_autocast_takes_the_same_node_and_gives_the_input_its_gradient_back() -> None:
    from lcp_plugin.adapter import Adapter, Factors
    from lcp_plugin.sdxl.adapted_unet import AdaptedUNet

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(8, 8)
            self.device = torch.device("cpu")

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.to_q(x)
            return output

    unet = Small().bfloat16().requires_grad_(False)
    adapted = AdaptedUNet({"unet": unet})
    factors = Factors(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    adapted.attach(Adapter({"unet.to_q": factors}))
    adapted.train()
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = adapted(x)
    assert type(output.grad_fn).__name__ == "AdaptedLinearBackward"
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    adapted.plain = True
    assert type(adapted(x.bfloat16()).grad_fn).__name__ == "AdaptedLinearBackward"
