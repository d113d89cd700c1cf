"""`butterfly_qkv`: a layer whose thirds are attention's q, k and v, and whose backward takes their
gradients as three tensors, without putting them side by side first."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import validation
from .activations import NONE
from .autograd import as_rows, backward_operator, forward_operator, needs_grad, run_linear
from .functional import allows_tf32, autocast_input, check_call
from .mlp import Weights
from .rounding import round_weights


def butterfly_qkv(
    x: torch.Tensor, weights: Weights, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Applies a layer and takes its output apart into the heads of q, k and v.

    Computes what `butterfly_lowrank_mm`, `unflatten(2, (3, H, D))`, `unbind(2)` and `transpose(1,
    2)` do. On Hopper GPUs, in 16 bits, its backward reads the three gradients where they lie if
    their rows `[B * tokens, H * D]` do so one behind the other, as those of torch's fused
    attention; elsewhere it copies them into one tensor.

    Args:
        x: `[B, tokens, K]`, dtypes as in `butterfly_lowrank_mm`.
        weights: from K to `N = 3 * H * D` features.
        num_heads: H.

    Returns:
        q, k and v, each `[B, H, tokens, D]`, views of one tensor, in x's dtype (autocast's inside
        an autocast region).

    Raises:
        TypeError: as `butterfly_lowrank_mm`.
        ValueError: as `butterfly_lowrank_mm`, or x has other dims, or H does not divide `N / 3`.
        RuntimeError: as `butterfly_lowrank_mm`.

    Example:
        >>> import torch
        >>> from pixelfly.masks import flat_block_butterfly
        >>> from pixelfly.ops import Weights, butterfly_qkv
        >>> layout = flat_block_butterfly(384, 128, block_size=32)
        >>> weights = Weights(torch.randn(layout.nnz, 32, 32) / 8, layout)
        >>> q, k, v = butterfly_qkv(torch.randn(2, 5, 128), weights, 4)
        >>> q.shape
        torch.Size([2, 4, 5, 32])
    """
    x, dtype = autocast_input(x)
    compiling = torch.compiler.is_compiling()
    blocks, layout, *factors = weights
    call = None if compiling else validation.known_call(x, *weights, dtype is not None)
    if call is None or not validation.known_ends(x, call.in_features, None, call.out_features):
        blocks, *factors, _, call = check_call(x, blocks, layout, *factors, None, None, dtype)
    if x.dim() != 3:
        raise ValueError(f"butterfly_qkv: x must be [B, tokens, K], got {list(x.shape)}")
    if num_heads <= 0 or call.out_features % (3 * num_heads):
        raise ValueError(
            f"butterfly_qkv: num_heads must divide a third of out_features={call.out_features}, "
            f"got {num_heads}"
        )
    tensors = blocks, *factors
    options = call.plan, call.header, allows_tf32(x), num_heads
    if not compiling:
        return _qkv(x, *tensors, *options)
    contiguous = (None if w is None else w.contiguous() for w in tensors)
    return torch.ops.pixelfly.qkv(x, *contiguous, *options)


def _heads(y: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v `[B, H, tokens, D]` of `y [B, tokens, 3 * H * D]`."""
    return y.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _qkv(x, blocks, u, v, bias, plan, header, allow_tf32, num_heads) -> tuple[torch.Tensor, ...]:
    differentiated = needs_grad(x, blocks, u, v, bias)
    # Under torch.func and with tangents: to the one place that knows what is to be refused.
    special = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if differentiated and not special:
        return _QKV.apply(x, blocks, u, v, bias, plan, header, allow_tf32, num_heads)
    y, _ = run_linear(
        x, blocks, u, v, bias, None, plan, header, NONE, False, allow_tf32, None, False,
        needs_grad=differentiated,
    )  # fmt: skip
    return _heads(y, num_heads)


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, blocks, u, v, bias, plan, header, allow_tf32, num_heads
    ) -> tuple[torch.Tensor, ...]:
        ctx.float32_grads = x.dtype != torch.float32 == blocks.dtype
        rows = as_rows(x)
        blocks, u, v, bias = round_weights(x.dtype, blocks, u, v, bias)
        y, t, _ = forward_operator(
            rows, blocks, u, v, bias, None, plan, header, NONE, False, allow_tf32
        )
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[1:5]):
            rows = t = None  # frozen weights: dx needs neither
        ctx.save_for_backward(rows, blocks, u, v, t, plan)
        ctx.x_shape, ctx.header, ctx.allow_tf32 = x.shape, header, allow_tf32
        return _heads(y.view(*x.shape[:2], y.shape[1]), num_heads)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grads: list[torch.Tensor | None] = [None] * 9
        thirds = [None if dy is None else _rows(dy) for dy in dys]
        given = next((dy for dy in thirds if dy is not None), None)
        needs = ctx.needs_input_grad[:5]
        if given is None or not any(needs):
            return tuple(grads)
        dy, *others = (torch.zeros_like(given) if dy is None else dy for dy in thirds)
        x, blocks, u, v, t, plan = ctx.saved_tensors
        grads[:5] = backward_operator()(
            dy, x, blocks, u, v, t, None, plan, ctx.header, False, ctx.allow_tf32,
            torch.are_deterministic_algorithms_enabled(), *needs, None, ctx.float32_grads, *others,
        )  # fmt: skip
        if needs[0]:
            grads[0] = grads[0].view(ctx.x_shape)
        return tuple(grads)


def _rows(dy: torch.Tensor) -> torch.Tensor:
    """`dy [B, H, tokens, D]` as rows `[B * tokens, H * D]`: a view where its memory allows it."""
    batch, heads, tokens, width = dy.shape
    return as_rows(dy.transpose(1, 2).reshape(batch * tokens, heads * width))


def register(library: torch.library.Library) -> None:
    """Attaches `qkv`; called once, on import."""
    library.impl("qkv", _qkv, "CompositeImplicitAutograd")
