"""A layout as a tensor, for checkpoints.

A tensor, not a dict: safetensors files, distributed checkpoints and weight averaging take tensors
only.
"""

from __future__ import annotations

import numpy as np
import torch

from ..masks import BlockLayout

_VERSION = 1
_FIELDS = 6  # version, N, K, b, grid rows, grid columns


def encode_layout(layout: BlockLayout) -> torch.Tensor:
    """Returns the layout as a uint8 tensor: six little-endian int32 and the grid's bits.

    Example:
        >>> from pixelfly.masks import block_diagonal
        >>> layout = block_diagonal(64, 64, block_size=16)
        >>> decode_layout(encode_layout(layout)) == layout
        True
    """
    grid = layout.grid.cpu().numpy().astype(bool)
    sizes = (_VERSION, layout.out_features, layout.in_features, layout.block_size, *grid.shape)
    header = np.array(sizes, dtype="<i4").view(np.uint8)
    return torch.from_numpy(np.concatenate([header, np.packbits(grid)]))


def decode_layout(state: object) -> BlockLayout:
    """Returns the layout that `encode_layout` stored; raises ValueError if it is not one."""
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.is_meta:
        kind = type(state).__name__
        raise ValueError(f"the stored layout must be a uint8 tensor, got {kind}")
    data = state.detach().cpu().numpy().reshape(-1)
    header = data[: 4 * _FIELDS].tobytes()
    if len(header) < 4 * _FIELDS:
        raise ValueError(f"the stored layout is cut off: {len(data)} bytes")
    version, n, k, b, rows, cols = (int(i) for i in np.frombuffer(header, dtype="<i4"))
    if version != _VERSION:
        raise ValueError(f"the stored layout must have version {_VERSION}, got {version}")
    packed = data[4 * _FIELDS :]
    if min(rows, cols, b) <= 0 or len(packed) != -(-rows * cols // 8):
        raise ValueError(f"the stored layout is damaged: {len(packed)} bytes for {rows}x{cols}")
    bits = np.unpackbits(packed, count=rows * cols)
    grid = torch.from_numpy(bits.reshape(rows, cols).astype(bool))
    return BlockLayout.from_grid(grid, b, n, k)


def describe(layout: BlockLayout) -> str:
    """Returns one line about a layout, for messages."""
    return (
        f"{layout.in_features}->{layout.out_features}, block_size={layout.block_size}, "
        f"nnz={layout.nnz}"
    )
