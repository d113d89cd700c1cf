"""`add_layer_norm`: the addition of a residual branch and the LayerNorm behind it in one pass.

Schemas are defined in csrc/torch/library.cpp, CUDA kernels beside them. Compiled code gets torch's
own operators instead, which inductor fuses as well.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from .autograd import needs_grad
from .device import PLAIN, has_kernels
from .functional import products_dtype
from .validation import DTYPES

OP = "add_layer_norm"
# Of csrc/launch/layer_norm_types.h.
MAX_FEATURES = 16384
# Dtypes of x, delta and y that the kernels take: beside float32 one 16-bit dtype.
_HALVES = (torch.bfloat16, torch.float16)
_SERVED = frozenset(
    [(half, half, half) for half in _HALVES]
    + [
        (torch.float32, delta, y)
        for half in _HALVES
        for delta in (torch.float32, half)
        for y in (torch.float32, half)
    ]
)
# Overloads, not packets, which choose one at every call.
_forward_op = torch.ops.pixelfly.add_layer_norm.default
_backward_op = torch.ops.pixelfly.add_layer_norm_backward.default


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a branch to the residual stream and normalizes the sum.

    Computes `h = x + delta` and `y = LayerNorm(h) * weight + bias` over the last dimension; means
    and variances in float32. On CUDA one kernel does it where C is a multiple of 8 up to 16384 and
    x and delta are contiguous, and one gives all gradients but those of weight and bias, whose sums
    take a second; elsewhere, and in compiled code, torch's own operators do. Deterministic. The
    kernels are differentiable once.

    Args:
        x: `[..., C]`, the residual stream: bfloat16, float16, float32 or, on the CPU, float64.
        delta: `[..., C]`, the branch, in x's dtype or, beside a float32 x, 16 bits; or None.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, weight's dtype.
        eps: added to the variance.
        dtype: y's. None: autocast's inside an autocast region, else x's.

    Returns:
        y: `[..., C]`, the next branch's input.
        h: `[..., C]` in x's dtype, the stream; x itself where delta is None. Going on with it, not
            with x, adds both gradients of x inside the backward kernel.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a shape or a device is wrong.

    Example:
        >>> import torch
        >>> from pixelfly.ops import add_layer_norm
        >>> stream, branch = torch.randn(2, 5, 64), torch.randn(2, 5, 64).bfloat16()
        >>> weight, bias = torch.ones(64), torch.zeros(64)
        >>> y, stream = add_layer_norm(stream, branch, weight, bias, dtype=torch.bfloat16)
        >>> y.dtype, stream.dtype, y.shape
        (torch.bfloat16, torch.float32, torch.Size([2, 5, 64]))
    """
    if dtype is None and isinstance(x, torch.Tensor):
        dtype = products_dtype(x)
    if torch.compiler.is_compiling() or not _kernels_serve(x, delta, weight, bias, dtype):
        _check(x, delta, weight, bias, dtype)
        return _plain(x, delta, weight, bias, eps, dtype)
    if needs_grad(x, delta, weight, bias):
        return _AddLayerNorm.apply(x, delta, weight, bias, eps, dtype)
    y, h, _, _ = _forward_op(x, delta, weight, bias, eps, dtype)
    return y, x if h is None else h


def _plain(x, delta, weight, bias, eps, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's operators; 16-bit tensors beside float32 weights are widened once."""
    h = x if delta is None else x + delta
    wide = torch.promote_types(h.dtype, weight.dtype)
    y = F.layer_norm(h.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(dtype), h


@functools.cache
def _has_kernels(device, stream, branch, weights, dtype, features) -> bool:
    """Whether there are kernels for a device, dtypes of x, delta, weight and y, and C."""
    if (stream, branch, dtype) not in _SERVED or weights not in (torch.float32, stream):
        return False
    if features % 8 or not 0 < features <= MAX_FEATURES:
        return False
    return has_kernels(device)


def _kernels_serve(x, delta, weight, bias, dtype) -> bool:
    """Whether the kernels take a call. A wrong one they do not: it is checked at leisure."""
    if type(x) not in PLAIN or not x.is_cuda or x.dim() == 0:
        return False
    if type(weight) not in PLAIN or type(bias) not in PLAIN:
        return False
    shape, stream, device = x.shape, x.dtype, x.device
    branch = stream
    if delta is not None:
        if type(delta) not in PLAIN or delta.shape != shape or delta.device != device:
            return False
        if not delta.is_contiguous():
            return False
        branch = delta.dtype
    weights = weight.dtype
    return (
        isinstance(dtype, torch.dtype)
        and weight.shape == shape[-1:] == bias.shape
        and weights == bias.dtype
        and weight.device == device == bias.device
        and x.is_contiguous()
        and weight.is_contiguous()
        and bias.is_contiguous()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # tangents would be dropped without a word
        and _has_kernels(device, stream, branch, weights, dtype, shape[-1])
    )


def _check(x, delta, weight, bias, dtype) -> None:
    """Raises TypeError or ValueError: the argument, what was expected and what came."""
    tensors = {"x": x, "delta": delta, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor) and not (name == "delta" and t is None):
            or_none = " or None" if name == "delta" else ""
            raise TypeError(f"{OP}: {name} must be a Tensor{or_none}, got {type(t).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{OP}: x.dtype must be bfloat16, float16, float32 or float64, got {x.dtype}"
        )
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(
            f"{OP}: dtype must be bfloat16, float16, float32, float64 or None, got {dtype!r}"
        )
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have shape [..., C], got a 0-d tensor")
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name}.device must be x.device={x.device}, got {t.device}")
    if delta is not None:
        if delta.shape != x.shape:
            raise ValueError(
                f"{OP}: delta.shape must be x.shape={list(x.shape)}, got {list(delta.shape)}"
            )
        narrow = x.dtype == torch.float32 and delta.dtype in _HALVES
        if delta.dtype != x.dtype and not narrow:
            raise TypeError(
                f"{OP}: delta.dtype must be x.dtype={x.dtype} or, beside a float32 x, bfloat16 or "
                f"float16, got {delta.dtype}"
            )
    features = x.shape[-1]
    for name, t in (("weight", weight), ("bias", bias)):
        if t.dim() != 1 or t.shape[0] != features:
            raise ValueError(
                f"{OP}: {name}.shape must be [C] = {[features]} as x.shape[-1], got {list(t.shape)}"
            )
    if weight.dtype not in (torch.float32, x.dtype):
        raise TypeError(
            f"{OP}: weight.dtype must be float32 or x.dtype={x.dtype}, got {weight.dtype}"
        )
    if bias.dtype != weight.dtype:
        raise TypeError(f"{OP}: bias.dtype must be weight.dtype={weight.dtype}, got {bias.dtype}")


class _AddLayerNorm(torch.autograd.Function):
    """`pixelfly::add_layer_norm` with its derivative; returns y and h."""

    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps, dtype):
        y, h, mean, rstd = _forward_op(x, delta, weight, bias, eps, dtype)
        if h is None:
            h = x
        # An unused output's gradient then comes as None instead of as a tensor of zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.delta_dtype = None if delta is None else delta.dtype
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> tuple[Any, ...]:
        branch = ctx.delta_dtype
        if dy is None:
            ddelta = None if branch is None or dh is None else dh.to(branch)
            return dh, ddelta, None, None, None, None
        h, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        narrow = branch if needs[1] and branch != h.dtype else None
        # Under create_graph=True the gradients must refuse to be differentiated.
        backward = _Backward.apply if torch.is_grad_enabled() else _backward_op
        dx, ddelta, dweight, dbias = backward(
            dy.contiguous(), None if dh is None else dh.contiguous(), h, weight, mean, rstd, narrow,
            needs[2] or needs[3],
        )  # fmt: skip
        if branch == h.dtype:
            ddelta = dx
        return dx, ddelta, dweight, dbias, None, None


class _Backward(torch.autograd.Function):
    """`pixelfly::add_layer_norm_backward`, and an error instead of its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor | None, ...]:
        return _backward_op(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{OP}: double backward is not implemented on CUDA; for gradients of gradients use "
            "torch.nn.functional.layer_norm(x + delta, ...)"
        )


def _forward_fake(x, delta, weight, bias, eps, y_dtype):
    rows = math.prod(x.shape[:-1])
    return (
        x.new_empty(x.shape, dtype=y_dtype),
        None if delta is None else x.new_empty(x.shape),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _backward_fake(dy, dh, h, weight, mean, rstd, ddelta_dtype, need_weights):
    return (
        h.new_empty(h.shape),
        None if ddelta_dtype is None else h.new_empty(h.shape, dtype=ddelta_dtype),
        weight.new_empty(weight.shape) if need_weights else None,
        weight.new_empty(weight.shape) if need_weights else None,
    )


def _forward_cpu(x, delta, weight, bias, eps, y_dtype):
    h = x if delta is None else x + delta
    y, mean, rstd = torch.native_layer_norm(
        h.float(), weight.shape, weight.float(), bias.float(), eps
    )
    return y.to(y_dtype), None if delta is None else h, mean.flatten(), rstd.flatten()


def _backward_cpu(dy, dh, h, weight, mean, rstd, ddelta_dtype, need_weights):
    wide = weight.float()
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.float(), h.float(), weight.shape, *(t.view(*h.shape[:-1], 1) for t in (mean, rstd)),
        wide, wide, [True, need_weights, need_weights],
    )  # fmt: skip
    if dh is not None:
        dx = dx + dh
    return (
        dx.to(h.dtype),
        None if ddelta_dtype is None else dx.to(ddelta_dtype),
        dweight.to(weight.dtype) if need_weights else None,
        dbias.to(weight.dtype) if need_weights else None,
    )


def register(library: torch.library.Library) -> None:
    """Attaches fakes and CPU kernels; called once, on import."""
    torch.library.register_fake("pixelfly::add_layer_norm", _forward_fake)
    torch.library.register_fake("pixelfly::add_layer_norm_backward", _backward_fake)
    library.impl("add_layer_norm", _forward_cpu, "CPU")
    library.impl("add_layer_norm_backward", _backward_cpu, "CPU")
