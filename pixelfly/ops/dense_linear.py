"""Dense linear layers of eager code under autocast, with one cast a layer and one node of autograd.

torch casts weight and bias one by one and keeps a node for each, each way: the host spends more on
those than on the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .autograd import as_rows, unflatten_rows
from .rounding import round_weights


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `x · weightᵀ + bias` in x's dtype: weight `[N, K]` and bias may be wider than x.

    What `F.linear` computes under autocast to x's dtype; the bias' gradient is summed in its own
    dtype. Differentiable once.
    """
    return _DenseLinear.apply(x, weight, bias)


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias) -> torch.Tensor:
        rounded, rounded_bias = round_weights(x.dtype, weight, bias)
        rows = as_rows(x)
        if rounded_bias is None:
            y = torch.mm(rows, rounded.t())
        else:
            y = torch.addmm(rounded_bias, rows, rounded.t())
        needs = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs[1] else None, rounded if needs[0] else None)
        ctx.shape, ctx.dtypes = x.shape, (weight.dtype, None if bias is None else bias.dtype)
        return unflatten_rows(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, rounded = ctx.saved_tensors
        needs, dy = ctx.needs_input_grad, as_rows(dy)
        dx = dweight = dbias = None
        if needs[0]:
            dx = torch.mm(dy, rounded).view(ctx.shape)
        if needs[1]:
            dweight = torch.mm(dy.t(), rows).to(ctx.dtypes[0])
        if needs[2]:
            dbias = dy.sum(0, dtype=ctx.dtypes[1])
        return dx, dweight, dbias
