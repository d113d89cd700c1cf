"""From a dense weight to blocks and low-rank factors, and back."""

from __future__ import annotations

import torch

from ..masks import BlockLayout
from ..ops.reference import dense_weight

__all__ = ["blocks_of", "dense_weight", "project", "truncated_svd"]

# Up to this side the Gram matrix's eigenvectors are exact and cheap; beyond, a randomised SVD.
_EXACT_SIDE = 2048


def blocks_of(weight: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Returns the kept blocks `[nnz, b, b]` of a dense `[N, K]` weight; tails are zero."""
    b = layout.block_size
    rows, cols = layout.grid.shape
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, cols * b - k, 0, rows * b - n))
    grid = padded.reshape(rows, b, cols, b).transpose(1, 2)
    row = layout.row_indices.to(dtype=torch.int64, device=weight.device)
    col = layout.col_indices.to(dtype=torch.int64, device=weight.device)
    return grid[row, col]


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `U√S` `[N, r]` and `√S Vᵀ` `[r, K]` of the best rank-r approximation."""
    n, k = matrix.shape
    if min(n, k) > _EXACT_SIDE:
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices):  # the caller's random numbers stay as they are
            torch.manual_seed(0)
            left, s, right = torch.svd_lowrank(matrix, q=min(rank + 16, n, k), niter=6)
        root = s[:rank].sqrt()
        return left[:, :rank] * root, (right[:, :rank] * root).T
    if n > k:
        v, u = truncated_svd(matrix.T, rank)
        return u.T, v.T
    # Eigenvectors of M Mᵀ, in float64 because squaring halves the digits.
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -rank:].flip(1)
    scaled = left.T @ wide  # S Vᵀ
    root = scaled.norm(dim=1).sqrt()
    right = scaled / root.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return (left * root).to(matrix.dtype), right.to(matrix.dtype)


@torch.no_grad()
def project(
    weight: torch.Tensor, layout: BlockLayout, rank: int = 0, *, steps: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Approximates a dense weight by `block-sparse + low rank`.

    The blocks are copied, the low rank is the truncated SVD of what they miss, and the blocks then
    take back what the low rank puts into them, so that the error is zero inside kept blocks. More
    steps repeat both halves; each is the best answer to the other, so the error never grows.

    Args:
        weight: `[N, K]`.
        layout: the kept blocks.
        rank: r; 0 for blocks only.
        steps: how often low rank and blocks are fitted to each other.

    Returns:
        blocks `[nnz, b, b]`, u `[N, r]` and v `[r, K]` (None if `rank` is 0) in weight's dtype.

    Example:
        >>> import torch
        >>> from pixelfly.masks import block_diagonal
        >>> layout = block_diagonal(64, 64, block_size=16)
        >>> weight = torch.randn(64, 2) @ torch.randn(2, 64)
        >>> blocks, u, v = project(weight, layout, rank=2, steps=20)
        >>> error = weight - dense_weight(blocks, layout) - u @ v
        >>> bool(error.norm() < 0.5 * weight.norm())
        True
    """
    if rank == 0:
        return blocks_of(weight, layout), None, None
    work = weight if weight.dtype == torch.float64 else weight.float()
    blocks = blocks_of(work, layout)
    for _ in range(max(1, steps)):
        u, v = truncated_svd(work - dense_weight(blocks, layout), rank)
        blocks = blocks_of(work - u @ v, layout)
    return blocks.to(weight.dtype), u.to(weight.dtype), v.to(weight.dtype)
