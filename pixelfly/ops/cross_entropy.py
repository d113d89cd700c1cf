"""`linear_cross_entropy`: the last layer of a language model and its loss, logits kept once.

The schema of `pixelfly::softmax_minus_target_` is in csrc/torch/library.cpp, its CUDA kernel beside
it. Products are ATen's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .device import has_kernels, plain_on_cuda
from .functional import _autocast_dtype, products_dtype
from .validation import DTYPES

OP = "linear_cross_entropy"
COLUMNS = 64  # the kernel reads vectors, and cuBLAS wants rows of logits aligned
_HALVES = (torch.bfloat16, torch.float16)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross entropy of the logits `x · weightᵀ`, which are formed but never copied.

    On CUDA with 16-bit products a hand-written kernel reads each row of logits once, sums in
    float32, and leaves the gradient of the loss in its place: instead of logits, their float32
    copy, its log-softmax and their gradients there is one tensor `[T, V]` in 16 bits (V rounded up
    to 64). Elsewhere torch's own operators do the same. Differentiable once with respect to x and
    weight.

    Args:
        x: `[..., K]`, what the last layer is given.
        weight: `[V, K]` in x's dtype or, beside 16 bits, float32 (as autocast leaves it).
        target: `[...]` int64, classes from 0 to V - 1 or `ignore_index`. On CUDA the loss of any
            other number is NaN.
        ignore_index: positions with this target have no loss and no gradient.
        reduction: "mean" over the positions that are not ignored, "sum" or "none".

    Returns:
        float32 (float64 for float64 x): a scalar, or `[...]` with reduction "none".

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a shape, a device or the reduction is wrong.

    Example:
        >>> import torch
        >>> from pixelfly.ops import linear_cross_entropy
        >>> hidden, weight = torch.randn(2, 5, 32), torch.randn(100, 32) / 6
        >>> target = torch.randint(0, 100, (2, 5))
        >>> loss = linear_cross_entropy(hidden, weight, target)
        >>> want = torch.nn.functional.cross_entropy((hidden @ weight.T).mT, target)
        >>> torch.allclose(loss, want, atol=1e-5)
        True
    """
    _check(x, weight, target, reduction)
    dtype = products_dtype(x)
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    if _kernels_serve(x, weight, dtype):
        rows, labels = rows.to(dtype).contiguous(), labels.contiguous()
        loss = _LinearCrossEntropy.apply(rows, weight, labels, ignore_index)
    else:
        logits = F.linear(rows, weight)
        wide = torch.promote_types(torch.float32, logits.dtype)
        loss = F.cross_entropy(logits.to(wide), labels, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (labels != ignore_index).sum()


def _check(x: Any, weight: Any, target: Any, reduction: str) -> None:
    for name, t in (("x", x), ("weight", weight), ("target", target)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a Tensor, got {type(t).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{OP}: x.dtype must be bfloat16, float16, float32 or float64, got {x.dtype}"
        )
    autocast = _autocast_dtype(x) is not None
    if weight.dtype != x.dtype and not (autocast and weight.dtype in DTYPES):
        raise TypeError(
            f"{OP}: weight.dtype must be x.dtype={x.dtype} (outside autocast), got {weight.dtype}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"{OP}: target.dtype must be int64, got {target.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have shape [..., K], got a 0-d tensor")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{OP}: weight.shape must be [V, K={x.shape[-1]}] with K as x.shape[-1] and V above 0, "
            f"got {list(weight.shape)}"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{OP}: target.shape must be x.shape[:-1]={list(x.shape[:-1])}, "
            f"got {list(target.shape)}"
        )
    for name, t in (("weight", weight), ("target", target)):
        if t.device != x.device:
            raise ValueError(f"{OP}: {name}.device must be x.device={x.device}, got {t.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{OP}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _kernels_serve(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    if not x.is_cuda or dtype not in _HALVES or weight.dtype not in (dtype, torch.float32):
        return False
    return (torch.compiler.is_compiling() or plain_on_cuda([x, weight])) and has_kernels(x.device)


def _padded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in another dtype, with rows of zeros up to a multiple of COLUMNS."""
    classes, features = weight.shape
    pad = -classes % COLUMNS
    if torch.compiler.is_compiling():
        return F.pad(weight.to(dtype), (0, 0, 0, pad))
    out = weight.new_empty(classes + pad, features, dtype=dtype)
    out[:classes].copy_(weight)
    out[classes:].zero_()
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of every row; keeps softmax - [target], the logits' gradient of a loss of one."""

    @staticmethod
    def forward(ctx: Any, x, weight, target, ignore_index) -> torch.Tensor:
        padded = _padded(weight, x.dtype)
        logits = torch.mm(x, padded.t())
        needs_grad = any(ctx.needs_input_grad[:2])
        loss = torch.ops.pixelfly.softmax_minus_target_(
            logits, target, weight.shape[0], ignore_index, needs_grad
        )
        if needs_grad:
            ctx.save_for_backward(x, padded, logits)
        ctx.classes, ctx.weight_dtype = weight.shape[0], weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, padded, dlogits = ctx.saved_tensors
        dx = dweight = None
        # The rows' factors in float32: 1 / T in 16 bits would be off for all of them alike.
        if ctx.needs_input_grad[0]:
            dx = (torch.mm(dlogits, padded) * dloss[:, None]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            scaled = (x * dloss[:, None]).to(x.dtype)
            dweight = torch.mm(dlogits.t(), scaled)[: ctx.classes].to(ctx.weight_dtype)
        return dx, dweight, None, None


def _fake(logits, target, classes, ignore_index, write):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _cpu(logits, target, classes, ignore_index, write):
    rows = logits[:, :classes].double()
    log_sum, valid = rows.logsumexp(1), (target >= 0) & (target < classes)
    at = target.where(valid, 0)[:, None]
    loss = (log_sum - rows.gather(1, at)[:, 0]).where(valid, torch.nan)
    ignored = target == ignore_index
    if write:
        grad = (rows - log_sum[:, None]).exp().scatter_add(1, at, torch.full_like(rows, -1.0))
        grad = grad.where(valid[:, None], torch.nan).masked_fill(ignored[:, None], 0)
        logits.zero_()[:, :classes] = grad.to(logits.dtype)
    return loss.masked_fill(ignored, 0).float()


def register(library: torch.library.Library) -> None:
    """Attaches the operator's fake and a CPU kernel (for tests); called once, on import."""
    torch.library.register_fake("pixelfly::softmax_minus_target_")(_fake)
    library.impl("softmax_minus_target_", _cpu, "CPU")
