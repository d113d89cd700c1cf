"""Initial weights whose layer output has the variance of a dense layer's, row by row."""

from __future__ import annotations

import math

import torch

from ..masks import BlockLayout
from .choice import kept_fan_in, kept_weights


def dense_std(in_features: int) -> float:
    """Returns the standard deviation of `nn.Linear`'s initial weight."""
    return 1 / math.sqrt(3 * in_features)


@torch.no_grad()
def init_weights_(
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    std: float | None = None,
    gate: float | None = None,
) -> None:
    """Fills blocks, u and v so that the layer's output has a dense layer's variance.

    A dense weight of standard deviation `std` gives outputs of variance `K std²` for inputs of unit
    variance. Blocks and low rank share it in proportion to their numbers of weights; a block row
    that keeps `f` inputs then draws its weights with variance `share · K std² / f`, and a row that
    keeps none leaves its part to the low rank.

    Args:
        blocks: `[nnz, b, b]`, filled in place; what lies past N or K becomes zero.
        layout: where the blocks sit.
        u: `[N, r]`, filled in place, or None.
        v: `[r, K]`, filled in place, or None.
        std: standard deviation of the dense weight; None takes `nn.Linear`'s.
        gate: g of `g·B + (1−g)·UV`, which the scales make up for; None without a gate.

    Example:
        >>> import torch
        >>> from pixelfly.masks import block_diagonal
        >>> layout = block_diagonal(64, 64, block_size=16)
        >>> blocks = torch.empty(layout.nnz, 16, 16)
        >>> init_weights_(blocks, layout, std=0.02)
        >>> bool((blocks.std() - 0.04).abs() < 0.004)  # keeps a quarter of the inputs
        True
    """
    n, k, b = layout.out_features, layout.in_features, layout.block_size
    std = dense_std(k) if std is None else std
    rank = 0 if u is None else u.shape[1]
    block_gain, lowrank_gain = (1.0, 1.0) if gate is None else (1 / gate, 1 / (1 - gate))
    total = k * std**2
    lowrank_share = 0.0
    if rank:
        lowrank_share = rank * (n + k) / (rank * (n + k) + kept_weights(layout))

    fan_in = kept_fan_in(layout)
    block_std = ((1 - lowrank_share) * total / fan_in.clamp(min=1)).sqrt() * block_gain
    # A uniform draw on [-a, a] has standard deviation a / √3.
    rows = layout.row_indices.to(dtype=torch.int64, device="cpu")
    bounds = (math.sqrt(3) * block_std)[rows].to(blocks)
    blocks.uniform_(-1, 1).mul_(bounds[:, None, None])
    clear_tails_(blocks, layout)

    if rank:
        bound = math.sqrt(3 / k)  # t = x vᵀ has unit variance
        v.uniform_(-bound, bound)
        row_total = torch.where(fan_in > 0, lowrank_share * total, total)
        u_std = (row_total / rank).sqrt() * lowrank_gain
        bounds = (math.sqrt(3) * u_std).repeat_interleave(b)[:n].to(u)
        u.uniform_(-1, 1).mul_(bounds[:, None])


@torch.no_grad()
def clear_tails_(blocks: torch.Tensor, layout: BlockLayout) -> None:
    """Zeroes what lies past N or K in the blocks of the last row and column."""
    b = layout.block_size
    row_tail, col_tail = layout.out_features % b, layout.in_features % b
    rows, cols = layout.grid.shape
    if row_tail:
        blocks[_members(layout.row_indices, rows - 1, blocks), row_tail:] = 0
    if col_tail:
        blocks[_members(layout.col_indices, cols - 1, blocks), :, col_tail:] = 0


def _members(indices: torch.Tensor, value: int, like: torch.Tensor) -> torch.Tensor:
    return (indices.cpu() == value).nonzero()[:, 0].to(like.device)
