"""`short_attention`: every score of short sequences, from q, k and v as one layer's output.

Schemas are defined in csrc/torch/library.cpp, CUDA kernels beside them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .autograd import needs_grad
from .device import PLAIN, has_hopper_kernels
from .functional import autocast_input
from .tracing import exporting, transformed
from .validation import DTYPES

OP = "short_attention"
# Of csrc/include/pixelfly/params.h.
MAX_TOKENS = 208
FEATURES = 64
_HALVES = (torch.bfloat16, torch.float16)
_TINY = torch.finfo(torch.float32).tiny
# Overloads, not packets, which choose one at every call.
_forward_op = torch.ops.pixelfly.short_attention.default
_backward_op = torch.ops.pixelfly.short_attention_backward.default


def short_attention(
    qkv: torch.Tensor, num_heads: int, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of every token to every token of its sample, on q, k and v packed in one tensor.

    Computes `softmax(scale · q · kᵀ) · v` for every sample and head; no mask. On Hopper GPUs, in 16
    bits, for heads of 64 features, at most 208 tokens and a positive scale, one kernel does it and
    one gives the gradient of all of qkv, neither copying q, k or v. Both keep scores on chip and
    are deterministic; the gradient cannot be differentiated again. Elsewhere torch's
    `scaled_dot_product_attention` does the same, for which alone `torch.nn.attention.sdpa_kernel`
    chooses.

    Args:
        qkv: `[B, T, 3 * H * D]`, the heads of q, then of k, then of v: bfloat16, float16, float32
            or float64.
        num_heads: H.
        scale: of the scores; None: `D ** -0.5`.

    Returns:
        `[B, T, H * D]`, heads side by side, in qkv's dtype (autocast's inside an autocast region).

    Raises:
        TypeError: qkv is no tensor or has another dtype, or num_heads is no int.
        ValueError: qkv has other dims, or 3 * H does not divide its features.

    Example:
        >>> import torch
        >>> from pixelfly.ops import short_attention
        >>> short_attention(torch.randn(2, 197, 3 * 192), 3).shape
        torch.Size([2, 197, 192])
    """
    _check(qkv, num_heads)
    qkv, _ = autocast_input(qkv)
    width = qkv.shape[2] // (3 * num_heads)
    scale = width**-0.5 if scale is None else float(scale)
    # The kernels look for the largest score before they scale it, in float32.
    if scale >= _TINY and _plain(qkv) and serves(qkv.dtype, qkv.shape[1], width, qkv.device):
        qkv = qkv.contiguous()
        if needs_grad(qkv):
            return _ShortAttention.apply(qkv, num_heads, scale)
        return _forward_op(qkv, num_heads, scale)[0]
    # Taken apart in memory's order: the gradients then meet in one copy.
    thirds = qkv.unflatten(2, (3, num_heads, width)).unbind(2)
    q, k, v = (third.transpose(1, 2) for third in thirds)
    if scale < _TINY:  # torch's fused kernels give NaN
        q, scale = scale * q, 1.0
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def serves(dtype: torch.dtype, tokens: int, head_features: int, device: torch.device) -> bool:
    """Whether the kernels take attention of a dtype, T and D on a device.

    An exported program, which may meet other lengths and devices, is given torch's operator.
    """
    return (
        dtype in _HALVES
        and head_features == FEATURES
        and not exporting()
        and has_hopper_kernels(device)
        and 1 <= tokens <= MAX_TOKENS
    )


def _plain(qkv: torch.Tensor) -> bool:
    """Whether neither qkv nor what surrounds the call wants more than values and gradients."""
    return type(qkv) in PLAIN and not transformed()


def _check(qkv: Any, num_heads: Any) -> None:
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"{OP}: qkv must be a Tensor, got {type(qkv).__name__}")
    if qkv.dtype not in DTYPES:
        raise TypeError(
            f"{OP}: qkv.dtype must be bfloat16, float16, float32 or float64, got {qkv.dtype}"
        )
    if not isinstance(num_heads, int):
        raise TypeError(f"{OP}: num_heads must be an int, got {type(num_heads).__name__}")
    if qkv.dim() != 3:
        raise ValueError(f"{OP}: qkv must be [B, T, 3 * H * D], got {list(qkv.shape)}")
    features = qkv.shape[2]
    if num_heads <= 0 or features == 0 or features % (3 * num_heads):
        raise ValueError(
            f"{OP}: num_heads must divide a third of qkv.shape[2]={features}, got {num_heads}"
        )


class _ShortAttention(torch.autograd.Function):
    """`pixelfly::short_attention` with its derivative."""

    @staticmethod
    def forward(ctx: Any, qkv, heads, scale) -> torch.Tensor:
        y, log_sum = _forward_op(qkv, heads, scale)
        ctx.save_for_backward(qkv, y, log_sum)
        ctx.heads, ctx.scale = heads, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dqkv = _backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.scale)
        return dqkv, None, None


def _fake(qkv, heads, scale):
    batch, tokens, features = qkv.shape
    y = qkv.new_empty(batch, tokens, features // 3)
    return y, qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def _backward_fake(dy, qkv, y, log_sum, heads, scale):
    return qkv.new_empty(qkv.shape)


def _apart(t: torch.Tensor, parts: int, heads: int) -> torch.Tensor:
    """`t [B, T, parts * heads * D]` as `[parts, B, heads, T, D]`, in float32 or wider."""
    wide = t.to(torch.promote_types(torch.float32, t.dtype))
    return wide.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


@torch.autocast("cpu", enabled=False)
def _cpu(qkv, heads, scale):
    q, k, v = _apart(qkv, 3, heads)
    scores = scale * (q @ k.mT)
    y = scores.softmax(3) @ v
    return y.transpose(1, 2).flatten(2).to(qkv.dtype), scores.logsumexp(3).float()


@torch.autocast("cpu", enabled=False)
def _backward_cpu(dy, qkv, y, log_sum, heads, scale):
    q, k, v = _apart(qkv, 3, heads)
    (dy,), (y,) = _apart(dy, 1, heads), _apart(y, 1, heads)
    weights = (scale * (q @ k.mT) - log_sum[..., None]).exp()
    dscores = scale * weights * (dy @ v.mT - (dy * y).sum(3, keepdim=True))
    grads = torch.stack((dscores @ k, dscores.mT @ q, weights.mT @ dy))
    return grads.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)


def _flops(qkv_shape, heads, scale, out_shape=None, **kwargs) -> int:
    batch, tokens, features = qkv_shape
    return 2 * 2 * batch * tokens * tokens * (features // 3)  # q kᵀ, p v


def _backward_flops(
    dy_shape, qkv_shape, y_shape, log_sum_shape, heads, scale, out_shape=None, **kwargs
) -> int:
    return 5 * _flops(qkv_shape, heads, scale) // 2  # q kᵀ again, dv, dp, dq, dk


def register(library: torch.library.Library) -> None:
    """Attaches fakes, FLOP formulas and CPU kernels (for tests); called once, on import."""
    torch.library.register_fake("pixelfly::short_attention", _fake)
    torch.library.register_fake("pixelfly::short_attention_backward", _backward_fake)
    library.impl("short_attention", _cpu, "CPU")
    library.impl("short_attention_backward", _backward_cpu, "CPU")
    register_flop_formula(torch.ops.pixelfly.short_attention)(_flops)
    register_flop_formula(torch.ops.pixelfly.short_attention_backward)(_backward_flops)
