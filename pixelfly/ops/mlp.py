"""`butterfly_mlp`: two layers that share the derivative of the activation between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..masks import BlockLayout
from .activations import ACTIVATIONS, NONE, RELU, known_activation
from .autograd import as_rows, backward_operator, forward_operator, needs_grad, unflatten_rows
from .functional import allows_tf32, autocast_input, check_call, linear
from .rounding import round_weights
from .validation import known_call, known_ends


class Weights(NamedTuple):
    """What `butterfly_lowrank_mm` multiplies with: see there for shapes."""

    blocks: torch.Tensor
    layout: BlockLayout
    u: torch.Tensor | None = None
    v: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def butterfly_mlp(
    x: torch.Tensor,
    first: Weights,
    second: Weights,
    *,
    activation: str | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies two layers with an activation between: `second(act(first(x))) + residual`.

    Computes what two calls of `butterfly_lowrank_mm` do. Its backward saves a pass over the hidden
    activations: the second layer's kernel applies the activation's derivative where it writes its
    input's gradient. In bfloat16 that derivative is kept as a byte an element, in steps of 1/200.

    Args:
        x: `[..., K]`, dtypes as in `butterfly_lowrank_mm`.
        first: weights from K to H features.
        second: weights from H to N features.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: `[..., N]`, added to the output, or None.

    Returns:
        `[..., N]` in x's dtype (autocast's inside an autocast region).

    Raises:
        TypeError: as `butterfly_lowrank_mm`.
        ValueError: as `butterfly_lowrank_mm`.
        RuntimeError: as `butterfly_lowrank_mm`.

    Example:
        >>> import torch
        >>> from pixelfly.masks import flat_block_butterfly
        >>> from pixelfly.ops import Weights, butterfly_mlp
        >>> up = flat_block_butterfly(256, 128, block_size=32)
        >>> down = flat_block_butterfly(128, 256, block_size=32)
        >>> first = Weights(torch.randn(up.nnz, 32, 32) / 8, up)
        >>> second = Weights(torch.randn(down.nnz, 32, 32) / 8, down)
        >>> butterfly_mlp(torch.randn(3, 128), first, second, activation="gelu").shape
        torch.Size([3, 128])
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = _differentiable(x, first, second, activation, residual)
        if y is not None:
            return y
    # ReLU's derivative is read off its output instead: nothing but that output is kept.
    shared = activation not in (None, "relu")
    hidden, slope = linear(x, *first, activation, give_slope=shared)
    return linear(hidden, *second, None, residual, x_slope=slope)[0]


def _differentiable(
    x: torch.Tensor,
    first: Weights,
    second: Weights,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """Eager training's way: one function of autograd for both layers.

    None where nothing is differentiated or torch.func is at work. What is saved for the backward
    must not depend on earlier calls: checkpointing compares.
    """
    x, dtype = autocast_input(x)
    up = known_call(x, *first, dtype is not None)
    down = known_call(x, *second, dtype is not None)
    blocks1, layout1, *factors1 = first
    blocks2, layout2, *factors2 = second
    if (
        up is None
        or down is None
        or up.out_features != down.in_features
        or not known_ends(x, up.in_features, residual, down.out_features)
        or not known_activation(activation)
    ):
        blocks1, *factors1, _, up = check_call(
            x, blocks1, layout1, *factors1, None, activation, dtype
        )
        hidden = x.new_empty(1).expand(*x.shape[:-1], up.out_features)
        blocks2, *factors2, residual, down = check_call(
            hidden, blocks2, layout2, *factors2, residual, None, dtype
        )
    tensors = (x, blocks1, *factors1, blocks2, *factors2, residual)
    if not needs_grad(*tensors) or torch._C._are_functorch_transforms_active():
        return None
    plans = ((up.plan, down.plan), (up.header, down.header))
    return _MLP.apply(*tensors, *plans, ACTIVATIONS[activation], allows_tf32(x))


class _MLP(torch.autograd.Function):
    """`butterfly_mlp` of checked arguments; their leading dims may be any."""

    @staticmethod
    def forward(
        ctx, x, blocks1, u1, v1, bias1, blocks2, u2, v2, bias2, residual, plans, headers,
        activation, allow_tf32,
    ):  # fmt: skip
        needs = ctx.needs_input_grad
        ctx.float32_grads = tuple(x.dtype != torch.float32 == b.dtype for b in (blocks1, blocks2))
        blocks1, u1, v1, bias1, blocks2, u2, v2, bias2 = round_weights(
            x.dtype, blocks1, u1, v1, bias1, blocks2, u2, v2, bias2
        )
        rows = as_rows(x)
        save_slope = activation not in (NONE, RELU) and any(needs[:5])
        hidden, t1, slope = forward_operator(
            rows, blocks1, u1, v1, bias1, None, plans[0], headers[0], activation, save_slope,
            allow_tf32,
        )  # fmt: skip
        y, t2, _ = forward_operator(
            hidden, blocks2, u2, v2, bias2, None if residual is None else as_rows(residual),
            plans[1], headers[1], NONE, False, allow_tf32,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        if not any(needs[1:5]):
            rows = t1 = None  # frozen weights: gradients of inputs need neither
        if not any(needs[5:9]):
            t2 = None
            if activation != RELU:
                hidden = None
        ctx.save_for_backward(
            rows, blocks1, u1, v1, t1, slope, hidden, blocks2, u2, v2, t2, *plans
        )  # fmt: skip
        ctx.x_shape, ctx.headers, ctx.relu = x.shape, headers, activation == RELU
        ctx.allow_tf32 = allow_tf32
        return unflatten_rows(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if dy is None:
            return tuple(grads)
        rows, blocks1, u1, v1, t1, slope, hidden, blocks2, u2, v2, t2, *plans = ctx.saved_tensors
        if any(needs[:9]):
            backward = backward_operator()
            deterministic = torch.are_deterministic_algorithms_enabled()
            # The second layer's kernel applies the activation's derivative, but ReLU's.
            dz, *grads[5:9] = backward(
                as_rows(dy), hidden, blocks2, u2, v2, t2, None, plans[1], ctx.headers[1], False,
                ctx.allow_tf32, deterministic, any(needs[:5]), *needs[5:9], slope,
                ctx.float32_grads[1],
            )  # fmt: skip
        if any(needs[:5]):
            grads[:5] = backward(
                dz, rows, blocks1, u1, v1, t1, hidden if ctx.relu else None, plans[0],
                ctx.headers[0], ctx.relu, ctx.allow_tf32, deterministic, *needs[:5], None,
                ctx.float32_grads[0],
            )  # fmt: skip
            if needs[0] and len(ctx.x_shape) != 2:
                grads[0] = grads[0].view(ctx.x_shape)
        if needs[9]:
            grads[9] = dy
        return tuple(grads)
