"""The operators on the CPU: gathers and batched matrix products of ATen, never a dense weight.

Work goes by chunks of tokens and of classes (see cpu_schedule.py) small enough that the gathered
columns stay in the second-level cache: gathering all of x at once costs more than the product.
bfloat16 and float16 are computed in float32 and rounded once at the end, but for bfloat16 products
on CPUs that have instructions for them (twice as fast as float32).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .activations import (
    CODE_OF_ZERO,
    NONE,
    activation_slope,
    apply_activation,
    decode_slope,
    empty_slope,
    encode_slope,
    slope_dtype,
)
from .cpu_schedule import Batch, Schedule, forward_schedule, transposed_schedule
from .plan import Header

# Measured on 2 cores with 1 MiB of second-level cache each (4096 -> 4096, 11 %, float32): gathers
# of 1 to 4 MiB and chunks of 128 to 512 tokens are within 20 %; without chunks it is 2.7 times
# slower.
GATHER_BYTES = 2 << 20
CHUNK_TOKENS = 256


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bfloat16 and _cpu_multiplies_bfloat16():
        return dtype
    return _compute_dtype(dtype)


def _without_autocast() -> contextlib.AbstractContextManager[object]:
    # Autocast reaches into an operator's kernel and would round the float32 products again.
    if torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))


def _class_ranges(batch: Batch, tokens: int, b: int, itemsize: int) -> Iterator[tuple[int, int]]:
    per_class = max(1, tokens * batch.cols * b * itemsize)
    step = max(1, GATHER_BYTES // per_class)
    for begin in range(0, batch.classes, step):
        yield begin, min(begin + step, batch.classes)


def _gather(x: torch.Tensor, index: torch.Tensor, start: int | None, begin: int, end: int):
    """Returns columns `index[begin:end]` of `x [T, columns, b]`, as a view if they are a run."""
    if start is not None:
        return x[:, start + begin : start + end]
    return x.index_select(1, index[begin:end])


def _class_columns(x: torch.Tensor, batch: Batch, first: int, last: int) -> torch.Tensor:
    """Returns what classes `first:last` read of `x [T, C, b]`, as `[classes, T, cols · b]`."""
    c = batch.cols
    x = _gather(x, batch.col_index, batch.col_start, first * c, last * c)
    return x.reshape(x.shape[0], last - first, -1).transpose(0, 1)


def _class_rows(dz: torch.Tensor, batch: Batch, first: int, last: int) -> torch.Tensor:
    """Returns what classes `first:last` write of `dz [T, R, b]`, as `[classes, rows · b, T]`."""
    r = batch.rows
    dz = _gather(dz, batch.row_index, batch.row_start, first * r, last * r)
    return dz.reshape(dz.shape[0], last - first, -1).permute(1, 2, 0)


def _class_weights(
    blocks: torch.Tensor, batch: Batch, dtype: torch.dtype, transposed: bool
) -> torch.Tensor:
    """Returns the batch's weights as `[classes, cols · b, rows · b]` in the compute dtype."""
    if not batch.blocks_in_order:
        blocks = blocks.index_select(0, batch.block_index)
    b = blocks.shape[-1]
    w = blocks.view(batch.classes, batch.rows, batch.cols, b, b).to(dtype)
    if transposed:  # contraction over the out side of a block
        return w.permute(0, 2, 3, 1, 4).reshape(batch.classes, batch.cols * b, batch.rows * b)
    w = w.permute(0, 1, 3, 2, 4).reshape(batch.classes, batch.rows * b, batch.cols * b)
    return w.transpose(1, 2)


def _product(
    x: torch.Tensor,
    y: torch.Tensor,
    weights: list[torch.Tensor],
    schedule: Schedule,
    b: int,
) -> None:
    """Writes `x [T, C · b]` times the sparse matrix into `y [T, R · b]`, both in compute dtype."""
    tokens = x.shape[0]
    x = x.unflatten(1, (-1, b))
    y = y.unflatten(1, (-1, b))
    for batch, w in zip(schedule.batches, weights, strict=True):
        for first, last in _class_ranges(batch, tokens, b, x.element_size()):
            out = torch.bmm(_class_columns(x, batch, first, last), w[first:last])
            r = batch.rows
            out = out.view(last - first, tokens, r, b).transpose(0, 1)
            if batch.row_start is not None:
                begin = batch.row_start + first * r
                end = batch.row_start + last * r
                y[:, begin:end].view(tokens, last - first, r, b).copy_(
                    out if r == 1 else out.reshape(tokens, last - first, r, b)
                )
            else:
                index = batch.row_index[first * r : last * r]
                y.index_copy_(1, index, out.reshape(tokens, -1, b))
    if schedule.empty_rows is not None:
        y.index_fill_(1, schedule.empty_rows, 0)


def forward(x, blocks, u, v, bias, residual, plan, header, activation, save_slope, allow_tf32):
    """Computes `pixelfly::forward` (schema in csrc/torch/library.cpp): y, t, slope."""
    with _without_autocast():
        h = Header.parse(header)
        tokens, n, b = x.shape[0], h.out_features, h.block_size
        dtype = _compute_dtype(x.dtype)
        y = x.new_empty(tokens, n)
        slope = empty_slope(x, n) if save_slope else None
        t = None
        if u is not None:
            rank = u.shape[1]
            t = x.new_empty(tokens, -(-rank // 8) * 8)[:, :rank]
        schedule = forward_schedule(plan, h)
        factor = _product_dtype(x.dtype)
        weights = [_class_weights(blocks, batch, factor, False) for batch in schedule.batches]
        bias, u, v = (None if p is None else p.to(dtype) for p in (bias, u, v))
        direct = dtype == x.dtype and n == h.num_rows * b
        buffer = None if direct else x.new_empty(CHUNK_TOKENS, h.num_rows * b, dtype=factor)
        for begin in range(0, tokens, CHUNK_TOKENS):
            rows = slice(begin, min(begin + CHUNK_TOKENS, tokens))
            xc = x[rows].to(factor)
            z = y[rows] if direct else buffer[: xc.shape[0]]
            _product(_pad(xc, h.num_cols * b), z, weights, schedule, b)
            z = z[:, :n].to(dtype)
            if u is not None:
                # t is rounded to the storage dtype first: the backward pass reads that one.
                t[rows] = x[rows].to(dtype) @ v.t()
                z.addmm_(t[rows].to(dtype), u.t())
            if bias is not None:
                z += bias
            if save_slope:
                exact = activation_slope(z, activation)
                slope[rows] = encode_slope(exact) if slope.dtype == torch.uint8 else exact
            if activation != NONE:
                z = apply_activation(z, activation)
            if residual is not None:
                z = z + residual[rows]
            if z.data_ptr() != y[rows].data_ptr():
                y[rows] = z
        return y, t, slope


def _check_slope(name: str, slope: torch.Tensor | None, dy: torch.Tensor, relu: bool) -> None:
    saved = slope_dtype(dy.dtype)
    if slope is None or slope.dtype == saved or (relu and slope.dtype == dy.dtype):
        return
    raise RuntimeError(
        f"pixelfly::backward: {name} must be {saved}, as pixelfly::forward saves it for "
        f"{dy.dtype}, got {slope.dtype}"
    )


def _output_grad(dy, slope, relu: bool) -> torch.Tensor:
    """Returns `dz = dy ⊙ slope`; relu: `dy` where the slope, which may be y, is positive."""
    if not relu:
        dtype = _compute_dtype(dy.dtype)
        return (dy * decode_slope(slope, dtype)).to(dy.dtype)
    if slope.dtype == torch.uint8:
        return dy.masked_fill(slope <= CODE_OF_ZERO, 0)
    return torch.ops.aten.threshold_backward(dy, slope, 0)


def _input_grad(dz, blocks, s, v, x_slope, plan, h: Header) -> torch.Tensor:
    """Returns `dx = (dz · B + s · v) ⊙ x_slope`."""
    tokens, k, b = dz.shape[0], h.in_features, h.block_size
    dtype = _compute_dtype(dz.dtype)
    dx = dz.new_empty(tokens, k)
    schedule = transposed_schedule(plan, h)
    factor = _product_dtype(dz.dtype)
    weights = [_class_weights(blocks, batch, factor, True) for batch in schedule.batches]
    direct = dtype == dz.dtype and k == h.num_cols * b
    buffer = None if direct else dz.new_empty(CHUNK_TOKENS, h.num_cols * b, dtype=factor)
    for begin in range(0, tokens, CHUNK_TOKENS):
        rows = slice(begin, min(begin + CHUNK_TOKENS, tokens))
        dzc = dz[rows].to(factor)
        out = dx[rows] if direct else buffer[: dzc.shape[0]]
        _product(_pad(dzc, h.num_rows * b), out, weights, schedule, b)
        out = out[:, :k].to(dtype)
        if s is not None:
            out.addmm_(s[rows], v)
        if x_slope is not None:
            out *= decode_slope(x_slope[rows], dtype)
        if not direct:
            dx[rows] = out
    return dx


def _block_grad(dz, x, blocks, plan, h: Header, out_dtype: torch.dtype) -> torch.Tensor:
    """Returns `dB[k] = dzᵀ_i x_j` for every kept block `k = (i, j)`."""
    b, dtype, factor = h.block_size, _compute_dtype(x.dtype), _product_dtype(x.dtype)
    schedule = forward_schedule(plan, h)
    transposed = transposed_schedule(plan, h)
    # Both schedules partition the blocks; take the one that gathers less.
    if swap := transposed.gathered < schedule.gathered:
        schedule = transposed
    sums = [
        x.new_zeros(batch.classes, batch.rows * b, batch.cols * b, dtype=dtype)
        for batch in schedule.batches
    ]
    for begin in range(0, x.shape[0], CHUNK_TOKENS):
        rows = slice(begin, begin + CHUNK_TOKENS)
        xc = _pad(x[rows].to(factor), h.num_cols * b).unflatten(1, (-1, b))
        dzc = _pad(dz[rows].to(factor), h.num_rows * b).unflatten(1, (-1, b))
        left, right = (xc, dzc) if swap else (dzc, xc)
        for batch, total in zip(schedule.batches, sums, strict=True):
            for first, last in _class_ranges(batch, left.shape[0], b, factor.itemsize):
                a = _class_rows(left, batch, first, last)
                c = _class_columns(right, batch, first, last)
                if factor == dtype:
                    total[first:last].baddbmm_(a, c)
                else:
                    total[first:last] += torch.bmm(a, c)
    grad = blocks.new_empty(blocks.shape, dtype=out_dtype)
    for batch, total in zip(schedule.batches, sums, strict=True):
        total = total.view(batch.classes, batch.rows, b, batch.cols, b)
        total = total.permute(0, 1, 3, 4, 2) if swap else total.transpose(2, 3)
        if batch.blocks_in_order:
            grad.view(total.shape).copy_(total)
        else:
            grad.index_copy_(0, batch.block_index, total.reshape(-1, b, b).to(grad.dtype))
    return grad


def backward(
    dy, x, blocks, u, v, t, slope, plan, header, relu, allow_tf32, deterministic,
    need_dx, need_dblocks, need_du, need_dv, need_dbias, x_slope, float32_grads, dy_k=None,
    dy_v=None,
):  # fmt: skip
    """Computes `pixelfly::backward`: dx, dblocks, du, dv, dbias, None where not needed."""
    with _without_autocast():
        h = Header.parse(header)
        if (dy_k is None) != (dy_v is None):
            raise RuntimeError("pixelfly::backward: dy_k and dy_v must be given together")
        if dy_k is not None:
            dy = torch.cat((dy, dy_k, dy_v), 1)
        _check_slope("slope", slope, dy, relu)
        _check_slope("x_slope", x_slope, dy, False)
        dtype = _compute_dtype(dy.dtype)
        grad_dtype = torch.float32 if float32_grads else dy.dtype
        dz = dy if slope is None else _output_grad(dy, slope, relu)
        s = None
        if u is not None and (need_dx or need_dv):
            s = dz.to(dtype) @ u.to(dtype)
        dx = dblocks = du = dv = dbias = None
        if need_dx:
            dx = _input_grad(dz, blocks, s, None if v is None else v.to(dtype), x_slope, plan, h)
        if need_dblocks:
            dblocks = _block_grad(dz, x, blocks, plan, h, grad_dtype)
        if need_du:
            du = (dz.to(dtype).t() @ t.to(dtype)).to(grad_dtype)
        if need_dv:
            dv = (s.t() @ x.to(dtype)).to(grad_dtype)
        if need_dbias:
            dbias = dz.sum(0, dtype=dtype).to(grad_dtype)
        return dx, dblocks, du, dv, dbias


def register(library: torch.library.Library) -> None:
    """Registers the CPU kernels of the operators."""
    library.impl("forward", forward, "CPU")
    library.impl("backward", backward, "CPU")
