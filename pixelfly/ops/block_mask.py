"""FlexAttention's mask of an attention layout, made once.

Masks are constants of a traced program, as plans are (plan.py): dynamo asks for a mask's name while
it traces, finds the mask under that name, and its tensors become inputs of the graph. It cannot
trace the making of a mask, and a program that made its own would do so at every call.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..masks.attention import AttentionLayout
from .plan import named_constants

if not pytree.is_constant_class(AttentionLayout):
    pytree.register_constant(AttentionLayout)


def block_mask_of(
    layout: AttentionLayout,
    device: torch.device,
    is_causal: bool,
    hidden: torch.Tensor | None = None,
):
    """Returns the `BlockMask` of a layout.

    Args:
        device: where the attention runs.
        is_causal: drops keys after their query.
        hidden: bool `[B, kv_len]` of keys to ignore, or None.
    """
    padded = hidden is not None
    mask = getattr(_made, _mask_name((layout, device, is_causal, padded)))
    if not padded:
        return mask
    return type(mask)(
        mask.seq_lengths,
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
        mask.BLOCK_SIZE,
        _mask_mod(is_causal, hidden),
    )


# By layout, device, is_causal and padded. The mask of n blocks by n takes 16 n² bytes.
_made, _mask_name = named_constants("mask", lambda key: make_block_mask(*key))


def make_block_mask(
    layout: AttentionLayout, device: torch.device | str, is_causal: bool, padded: bool = False
):
    """Makes a `BlockMask` of the layout's grid.

    Args:
        padded: every kept block is partial, because keys in it may be ignored.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # Whatever mode the caller is in, a mask is of plain tensors that later calls can use.
    with _disable_current_modes(), torch.inference_mode(False):
        grid = layout.grid.to(device)
        partial = torch.zeros_like(grid)
        if is_causal:
            grid = grid.tril()
            partial = grid & torch.eye(*grid.shape[1:], dtype=torch.bool, device=device)
        if padded:
            partial = grid
        return BlockMask.from_kv_blocks(
            *_ordered(partial),
            *_ordered(grid & ~partial),
            BLOCK_SIZE=layout.block_size,
            mask_mod=_mask_mod(is_causal, None),
            seq_lengths=(layout.q_len, layout.kv_len),
        )


def _mask_mod(is_causal: bool, hidden: torch.Tensor | None):
    def keep(batch, head, q, kv):
        seen = q >= kv if is_causal else q >= 0
        return seen if hidden is None else seen & ~hidden[batch, kv]

    return keep


def _ordered(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[1, H, q blocks]` counts and `[1, H, q blocks, kv blocks]` indices, kept ones first."""
    order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
    return kept.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]
