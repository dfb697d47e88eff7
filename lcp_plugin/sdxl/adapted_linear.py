"""A linear layer and its LoRA as one node of the graph: y = W x + b + scale B A x.

The products of two layers and a sum, without their views, transposes and the sums of y's and x's
parts: a tenth of a small model's step, and with half-precision weights (bf16, fp16) the casts of x
and of the factors for each of them. All products are of the weight's type; fp32 factors are rounded
to it for the product alone, and their gradients come back in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AdaptedLinear(torch.autograd.Function):
    """y = W x + b + scale B A x of a frozen linear layer, with gradients for x, A and B.

    Once differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in), of any floating type
        weight: Tensor,  # (out, in)
        bias: Tensor | None,
        down: Tensor,  # A (rank, in)
        up: Tensor,  # B (out, rank)
        rounded: tuple[Tensor, Tensor] | None,  # A and B in the weight's type, if at hand
        scale: float,
    ) -> Tensor:  # (..., out), of the weight's type
        """W x + b + scale B A x."""
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        a, b = rounded if rounded is not None else (down.to(dtype), up.to(dtype))
        hidden = rows @ a.t()  # (n, rank)
        if scale != 1.0:
            hidden.mul_(scale)
        output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        output.addmm_(hidden, b.t())
        ctx.save_for_backward(rows, hidden, weight, a, b)
        ctx.scale, ctx.shape, ctx.type = scale, x.shape, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B; W and b are frozen."""
        rows, hidden, weight, a, b = ctx.saved_tensors
        of_x, _, _, of_down, of_up, _, _ = ctx.needs_input_grad
        outer = gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)
        inner = outer @ b  # (n, rank)
        if ctx.scale != 1.0:
            inner.mul_(ctx.scale)
        of_input = (outer @ weight).addmm_(inner, a).view(ctx.shape) if of_x else None
        return (
            None if of_input is None else of_input.to(ctx.type),
            None,
            None,
            inner.t() @ rows if of_down else None,
            outer.t() @ hidden if of_up else None,
            None,
            None,
        )
