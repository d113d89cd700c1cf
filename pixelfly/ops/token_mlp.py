"""An MLP over the tokens of `[B, N, C]`: dense weights, no transposed activations.

On Hopper in 16 bits every product is `pixelfly::column_product` (csrc/kernels/product_sm90.cuh over
a layout that keeps every block), with bias, activation and slope in its epilogue; elsewhere it is a
batched matrix product of ATen. Weight gradients are ATen's in both. Compiled code without those
kernels gets the transposed form: batched products of an expanded weight came out wrong from
inductor on CUDA (torch 2.11; on the CPU they are right).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ..masks import BlockLayout, dense
from .activations import NONE, apply_activation, slope_dtype
from .device import has_hopper_kernels, plain_on_cuda
from .plan import Header, device_plan, plan_header
from .rounding import round_weights

_column_product = torch.ops.pixelfly.column_product.default
_feature_sums = torch.ops.pixelfly.feature_sums.default
BLOCK = 64
COLUMNS_MULTIPLE = 16  # a row of slope codes is read in vectors


def token_layout(out_features: int, in_features: int) -> BlockLayout:
    """Returns the layout of every block of a dense weight, its sizes rounded up to whole blocks."""
    rounded = (-(-size // BLOCK) * BLOCK for size in (out_features, in_features))
    return dense(*rounded, block_size=BLOCK)


def token_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: int,
    layouts: tuple[BlockLayout, BlockLayout],
) -> torch.Tensor:
    """Returns `w2 · act(w1 · x + b1) + b2` for every sample of `x [B, N, C]`, in x's dtype.

    Weights may be wider than x; their gradients come in their own dtype. `layouts` are
    `token_layout`s of w1 and w2.
    """
    compiling = torch.compiler.is_compiling()
    plans: tuple[Any, ...] = (None, None, None, None)
    served = x.dtype.itemsize == 2 and has_hopper_kernels(x.device)
    if served and x.shape[2] % COLUMNS_MULTIPLE == 0:
        first, second = layouts
        # Equal layouts have one plan, and a traced function must not be given a tensor twice.
        equal = -(-w1.shape[0] // BLOCK) == -(-w1.shape[1] // BLOCK)
        plans = (
            device_plan(first, 0, x.device), plan_header(first, 0, x.device),
            None if equal else device_plan(second, 0, x.device), plan_header(second, 0, x.device),
        )  # fmt: skip
        if not compiling:  # these operators know no autocast: nothing to switch off
            return _TokenMLP.apply(x.contiguous(), w1, b1, w2, b2, activation, *plans)
    with torch.autocast(x.device.type, enabled=False):
        if compiling and plans[0] is None:
            w1, b1, w2, b2 = (None if w is None else w.to(x.dtype) for w in (w1, b1, w2, b2))
            return F.linear(apply_activation(F.linear(x.mT, w1, b1), activation), w2, b2).mT
        return _TokenMLP.apply(x.contiguous(), w1, b1, w2, b2, activation, *plans)


def _aligned(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of `like`, rows a multiple of 16 bytes apart.

    The 196 tokens of a Mixer are not, and cuBLAS then takes kernels of older GPUs.
    """
    n, k = weight.shape
    multiple = 16 // like.element_size()
    if k % multiple == 0:
        return weight.to(like.dtype)
    return like.new_empty(n, -(-k // multiple) * multiple)[:, :k].copy_(weight)


def _apply(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`weight · x + bias` for every sample; weight `[N, K]`, x `[B, K, C]`, bias `[N]`."""
    y = torch.bmm(weight.expand(x.shape[0], -1, -1), x)
    return y if bias is None else y.add_(bias[:, None])


def _weight_grad(dy: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of a weight: a product for every sample, summed in float32 or wider."""
    wide = torch.promote_types(torch.float32, like.dtype)
    if like.shape[1] % 8 == 0:
        return torch.bmm(dy, x.mT).sum(0, dtype=wide).to(like.dtype)
    # cuBLAS wants the rows of its result aligned.
    return torch.bmm(x, dy.mT).sum(0, dtype=wide).to(like.dtype).mT


def _bias_grads(
    dys: list[torch.Tensor], likes: list[torch.Tensor], kernels: bool
) -> list[torch.Tensor]:
    """The gradients of biases, summed in float32 or wider; with the kernels in one launch."""
    wides = [torch.promote_types(torch.float32, like.dtype) for like in likes]
    if dys and kernels and wides[0] == wides[-1] == torch.float32 and plain_on_cuda(dys):
        sums = _feature_sums(dys)
    else:
        # Rows first: torch sums over both at once at a third of the memory's speed.
        sums = [dy.sum(2, dtype=wide).sum(0) for dy, wide in zip(dys, wides, strict=True)]
    return [s.to(like.dtype) for s, like in zip(sums, likes, strict=True)]


def _activation_grad(dy: torch.Tensor, z: torch.Tensor, activation: int) -> torch.Tensor:
    aten = torch.ops.aten
    return {
        0: lambda: dy,
        1: lambda: aten.threshold_backward(dy, z, 0),
        2: lambda: aten.gelu_backward(dy, z),
        3: lambda: aten.gelu_backward(dy, z, approximate="tanh"),
        4: lambda: aten.silu_backward(dy, z),
    }[activation]()


class _TokenMLP(torch.autograd.Function):
    """Saves what the activation's derivative needs as `slope`: that or, without kernels, z."""

    @staticmethod
    def forward(
        ctx: Any, x, w1, b1, w2, b2, activation, plan1, header1, plan2, header2
    ) -> torch.Tensor:
        ctx.activation, ctx.headers = activation, (header1, header2)
        hidden_size, tokens = w1.shape[0], x.shape[1]
        if plan1 is None:
            first, second = _aligned(w1, x), _aligned(w2, x)
            slope = _apply(first, x, b1)
            hidden = apply_activation(slope, activation)
            y = _apply(second, hidden, b2)
        else:
            first, rounded1, second, rounded2 = round_weights(x.dtype, w1, b1, w2, b2, tile=BLOCK)
            save = activation != NONE and any(ctx.needs_input_grad[:3])
            last = plan1 if plan2 is None else plan2
            hidden, slope = _column_product(
                x, first, rounded1, None, plan1, header1, hidden_size, activation, save, False
            )
            y, _ = _column_product(
                hidden, second, rounded2, None, last, header2, tokens, NONE, False, False
            )
        ctx.save_for_backward(x, slope, hidden, first, second, w1, b1, w2, b2, plan1, plan2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, slope, hidden, first, second, w1, b1, w2, b2, plan1, plan2 = ctx.saved_tensors
        need_dx, need_dw1, need_db1, need_dw2, need_db2 = ctx.needs_input_grad[:5]
        dx = dw1 = dw2 = None
        dy = dy.contiguous()
        if need_dw2:
            dw2 = _weight_grad(dy, hidden, w2)
        dys, biases = ([dy], [b2]) if need_db2 else ([], [])
        if need_dx or need_dw1 or need_db1:
            if plan1 is None:
                dz = _activation_grad(_apply(second.mT, dy, None), slope, ctx.activation)
            else:
                last = plan1 if plan2 is None else plan2
                dz, _ = _column_product(
                    dy, second, None, slope, last, ctx.headers[1], w1.shape[0], NONE, False, True
                )
            if need_dw1:
                dw1 = _weight_grad(dz, x, w1)
            if need_db1:
                dys, biases = [*dys, dz], [*biases, b1]
            if need_dx and plan1 is None:
                dx = _apply(first.mT, dz, None)
            elif need_dx:
                dx, _ = _column_product(
                    dz, first, None, None, plan1, ctx.headers[0], x.shape[1], NONE, False, True
                )
        sums = iter(_bias_grads(dys, biases, plan1 is not None))
        db2 = next(sums) if need_db2 else None
        db1 = next(sums) if need_db1 else None
        return dx, dw1, db1, dw2, db2, None, None, None, None, None


def _column_product_fake(
    x, blocks, bias, slope, plan, header, out_features, activation, save_slope, transposed
):
    shape = (x.shape[0], out_features, x.shape[2])
    return x.new_empty(shape), x.new_empty(
        shape, dtype=slope_dtype(x.dtype)
    ) if save_slope else None


def _feature_sums_fake(tensors):
    return [x.new_empty(x.shape[1], dtype=torch.float32) for x in tensors]


def _feature_sums_cpu(tensors):
    return [x.sum(2, dtype=torch.float32).sum(0) for x in tensors]


def _column_product_flops(
    x_shape, blocks_shape, bias_shape, slope_shape, plan_shape, header, *args,
    out_shape=None, **kwargs,
) -> int:  # fmt: skip
    h = Header.parse(header)
    return 2 * x_shape[0] * x_shape[2] * h.nnz * math.prod(blocks_shape[1:])


def register(library: torch.library.Library) -> None:
    """Attaches fakes, a FLOP formula and a CPU kernel; called once, on import."""
    torch.library.register_fake("pixelfly::column_product", _column_product_fake)
    torch.library.register_fake("pixelfly::feature_sums", _feature_sums_fake)
    library.impl("feature_sums", _feature_sums_cpu, "CPU")
    register_flop_formula(torch.ops.pixelfly.column_product)(_column_product_flops)
