"""`butterfly_attention`: attention over the kept blocks of the scores.

On CUDA through torch's FlexAttention, whose block mask is made from the layout's grid; elsewhere
through batched matmuls over gathered blocks, block rows of one length together. Neither forms a
tensor of q_len x kv_len.
"""

from __future__ import annotations

import functools
import types

import torch
from torch.overrides import handle_torch_function, has_torch_function

from ..masks.attention import AttentionLayout
from .block_mask import block_mask_of

OP = "butterfly_attention"


def butterfly_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `softmax(q kᵀ · scale) v` over the scores that the layout keeps.

    A query that sees no key (its blocks are dropped, or all its keys are masked) gets zeros, and
    zero gradients, not NaN. Differentiable with respect to q, k and v.

    Args:
        q: `[B, H, q_len, D]`, bfloat16, float16, float32 or (CPU) float64.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, E]`.
        layout: kept blocks, for one head or for H.
        is_causal: also masks every key after its query; needs q_len == kv_len.
        scale: of the scores; default `1 / sqrt(D)`.
        key_padding_mask: bool `[B, kv_len]`, True where a key is to be ignored (as in
            `nn.MultiheadAttention`), or None.

    Returns:
        `[B, H, q_len, E]` in q's dtype.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a shape does not fit the layout or the other tensors.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3.

    Example:
        >>> import torch
        >>> from pixelfly.masks import butterfly_attention_layout
        >>> layout = butterfly_attention_layout(100, block_size=16, causal=True)
        >>> q, k, v = torch.randn(3, 2, 4, 100, 32)
        >>> butterfly_attention(q, k, v, layout, is_causal=True).shape
        torch.Size([2, 4, 100, 32])
    """
    _check(q, k, v, layout, is_causal, key_padding_mask)
    if has_torch_function((q, k, v)):  # a mode may stand in for it, as for torch's own
        options = {"is_causal": is_causal, "scale": scale, "key_padding_mask": key_padding_mask}
        return handle_torch_function(butterfly_attention, (q, k, v), q, k, v, layout, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda:
        return _flex(q, k, v, layout, is_causal, scale, key_padding_mask)
    return _gathered(q, k, v, layout, is_causal, scale, key_padding_mask)


def butterfly_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `butterfly_attention` with the whole score matrix; for tests."""
    keep = layout.to_dense().to(q.device)
    if is_causal:
        keep = keep.tril()
    if key_padding_mask is not None:
        keep = keep & ~key_padding_mask[:, None, None]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _masked_softmax(scores, keep) @ v


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    start: int,
    *,
    scale: float,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the queries from `start` on, as decoding with a cache needs it.

    Args:
        q: `[B, H, n, D]`, of the tokens `start` to `start + n`.
        k, v: `[B, H, layout.kv_len, D]`.
        layout: of the whole sequence.

    Returns:
        `[B, H, n, D]`; the n x kv_len scores are formed.
    """
    b = layout.block_size
    at_q = torch.arange(start, start + q.shape[2], device="cpu")  # as the layout's grid
    at_k = torch.arange(layout.kv_len, device="cpu")
    keep = layout.grid[:, at_q // b][:, :, at_k // b] & (at_q[:, None] >= at_k)
    keep = keep.to(q.device)
    if key_padding_mask is not None:
        keep = keep & ~key_padding_mask[:, None, None]
    return _masked_softmax(q @ k.mT * scale, keep) @ v


def _check(q, k, v, layout, is_causal, key_padding_mask) -> None:
    if not isinstance(layout, AttentionLayout):
        raise TypeError(f"{OP}: layout must be an AttentionLayout, got {type(layout).__name__}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{OP}: {name} must have a floating-point dtype, got {t.dtype}")
        if t.dim() != 4:
            raise ValueError(f"{OP}: {name} must be [B, H, tokens, features], got {list(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{OP}: {name} must have q's dtype and device ({q.dtype}, {q.device}), got "
                f"{t.dtype}, {t.device}"
            )
    batch, heads, q_len, features = q.shape
    if q_len != layout.q_len:
        raise ValueError(f"{OP}: q.shape[2] must be layout.q_len={layout.q_len}, got {q_len}")
    if list(k.shape) != [batch, heads, layout.kv_len, features]:
        raise ValueError(
            f"{OP}: k.shape must be {[batch, heads, layout.kv_len, features]}, got {list(k.shape)}"
        )
    if list(v.shape[:3]) != [batch, heads, layout.kv_len]:
        raise ValueError(
            f"{OP}: v.shape must begin with {[batch, heads, layout.kv_len]}, got {list(v.shape)}"
        )
    if layout.heads not in (1, heads):
        raise ValueError(f"{OP}: layout.heads must be 1 or q.shape[1]={heads}, got {layout.heads}")
    if is_causal and layout.q_len != layout.kv_len:
        raise ValueError(
            f"{OP}: is_causal needs q_len == kv_len, got {layout.q_len} and {layout.kv_len}"
        )
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"{OP}: key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if list(key_padding_mask.shape) != [batch, layout.kv_len]:
            raise ValueError(
                f"{OP}: key_padding_mask.shape must be {[batch, layout.kv_len]}, got "
                f"{list(key_padding_mask.shape)}"
            )


def _masked_softmax(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Softmax over the kept scores of each row, in fp32 at least; zeros where none is kept."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide = wide.masked_fill(~keep, -torch.inf)
    most = wide.detach().amax(-1, keepdim=True)
    weights = (wide - most.masked_fill(most == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)).to(scores.dtype)


def _gathered(q, k, v, layout, is_causal, scale, key_padding_mask) -> torch.Tensor:
    layout = layout.causal() if is_causal else layout
    b, (_, rows, cols) = layout.block_size, layout.grid.shape
    batch, heads = q.shape[:2]
    # One layout for all heads: heads go with the batch.
    folded = layout.heads == 1
    groups = layout.row_groups
    q, k, v = (
        _to_blocks(t, n, b).reshape(batch * heads, 1, n, b, t.shape[-1])
        if folded
        else _to_blocks(t, n, b)
        for t, n in ((q, rows), (k, cols), (v, cols))
    )
    outer, inner = q.shape[:2]
    hidden = torch.arange(cols * b, device=q.device) >= layout.kv_len  # past the sequence
    hidden = hidden.expand(batch, -1)
    if key_padding_mask is not None:
        pad = cols * b - layout.kv_len
        hidden = hidden | torch.nn.functional.pad(key_padding_mask, (0, pad), value=True)
    hidden = hidden.reshape(batch, cols, b).repeat_interleave(outer // batch, 0)  # [outer, cols, b]

    out = q.new_zeros(outer, inner * rows, b, v.shape[-1])
    flat_q = q.flatten(1, 2)
    flat_k, flat_v = k.flatten(1, 2), v.flatten(1, 2)
    for which, blocks in groups:
        which, blocks = which.to(q.device), blocks.to(q.device)
        d = blocks.shape[1]
        source = blocks + (which // rows * cols)[:, None]  # of this row's head
        keys = flat_k[:, source].flatten(2, 3)  # [outer, R, d * b, D]
        values = flat_v[:, source].flatten(2, 3)
        scores = flat_q[:, which] @ keys.mT * scale  # [outer, R, b, d * b]
        keep = ~hidden[:, blocks].reshape(outer, -1, 1, d * b)
        if is_causal:
            token = torch.arange(b, device=q.device)
            at_q = (which % rows)[:, None] * b + token
            at_k = (blocks[:, :, None] * b + token).flatten(1)
            keep = keep & (at_q[:, :, None] >= at_k[:, None, :])
        out = out.index_copy(1, which, _masked_softmax(scores, keep) @ values)
    out = out.reshape(batch, heads, rows * b, -1)
    return out[:, :, : layout.q_len]


def _to_blocks(t: torch.Tensor, count: int, block_size: int) -> torch.Tensor:
    """`[B, H, tokens, D]` to `[B, H, count, block_size, D]`, zeros past the sequence."""
    pad = count * block_size - t.shape[2]
    t = torch.nn.functional.pad(t, (0, 0, 0, pad)) if pad else t
    return t.unflatten(2, (count, block_size))


def _flex_call(q, k, v, block_mask, scale, kernel_options):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, kernel_options=kernel_options
    )


@functools.lru_cache(maxsize=256)
def _compiled_flex(key: tuple, autotune: bool):
    """Returns FlexAttention compiled for one `key` of shapes, dtype and mask.

    Dynamo counts recompilations per code object and, past its limit, would run FlexAttention
    uncompiled, with the whole score matrix: so every key has a code object of its own, and
    `fullgraph` makes anything else an error.
    """
    code = _flex_call.__code__.replace(co_name=f"flex_attention_{abs(hash(key)):x}")
    own = types.FunctionType(code, _flex_call.__globals__)
    options = {"max_autotune": True} if autotune else None
    return torch.compile(own, dynamic=False, fullgraph=True, options=options)


def _flex(
    q, k, v, layout, is_causal, scale, key_padding_mask, *, autotune=None, options=None
) -> torch.Tensor:
    """FlexAttention over the layout.

    Args:
        autotune: lets inductor try kernels; None: for mask blocks of 64 alone. Its one default
            kernel for the backward on sm_90 has tiles of 128 (bf16, heads of 64 and wider), which
            it drops for finer mask blocks whatever tiles `options` name; the tuned ones fit.
        options: FlexAttention's kernel options.
    """
    if layout.block_size < 64:
        raise ValueError(
            f"{OP}: on {q.device} layout.block_size must be 64 or 128, got {layout.block_size}"
        )
    mask = block_mask_of(layout, q.device, is_causal, key_padding_mask)
    autotune = layout.block_size == 64 if autotune is None else autotune
    # Short queries too take the kernel that reads every mask block.
    options = {"FORCE_USE_FLEX_ATTENTION": True} | (options or {})
    if torch.compiler.is_compiling():
        return _flex_call(q, k, v, mask, scale, options)
    padded = key_padding_mask is not None
    traced = torch.is_grad_enabled(), *(t.requires_grad for t in (q, k, v))
    strides = q.stride(), k.stride(), v.stride()
    key = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, traced, layout._sizes)
    key = (*key, layout.heads, is_causal, padded, scale, tuple(sorted(options.items())))
    return _compiled_flex(key, autotune)(q, k, v, mask, scale, options)
