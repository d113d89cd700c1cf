"""The specification of the operator in a few lines of plain torch: slow, differentiable, exact.

It builds the dense weight, so it is for tests and for reading, not for training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..masks import BlockLayout
from .activations import ACTIVATIONS, apply_activation


def dense_weight(blocks: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Returns the dense `[N, K]` matrix whose kept blocks are `blocks` and which is zero elsewhere.

    Args:
        blocks: `[nnz, b, b]`, row-major over the layout, out x in inside a block. What lies past
            `N` or `K` in the blocks of the last row or column is dropped.
        layout: where the blocks sit.
    """
    b = layout.block_size
    num_rows = -(-layout.out_features // b)
    num_cols = -(-layout.in_features // b)
    rows = torch.as_tensor(layout.row_indices, dtype=torch.int64, device=blocks.device)
    cols = torch.as_tensor(layout.col_indices, dtype=torch.int64, device=blocks.device)
    grid = blocks.new_zeros(num_rows, num_cols, b, b).index_put((rows, cols), blocks)
    weight = grid.transpose(1, 2).reshape(num_rows * b, num_cols * b)
    return weight[: layout.out_features, : layout.in_features]


def butterfly_lowrank_mm_reference(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `act(x · Bᵀ + (x · vᵀ) · uᵀ + bias) + residual` with dense matrices.

    Takes the arguments of `butterfly_lowrank_mm`, any dtype and device, and is differentiable any
    number of times. It does not check them.

    Example:
        >>> import torch
        >>> from pixelfly.masks import block_diagonal
        >>> layout = block_diagonal(32, 32, block_size=16)
        >>> x, blocks = torch.randn(4, 32), torch.randn(2, 16, 16)
        >>> butterfly_lowrank_mm_reference(x, blocks, layout).shape
        torch.Size([4, 32])
    """
    z = F.linear(x, dense_weight(blocks, layout), bias)
    if u is not None:
        z = z + F.linear(F.linear(x, v), u)
    y = apply_activation(z, ACTIVATIONS[activation])
    return y if residual is None else y + residual
