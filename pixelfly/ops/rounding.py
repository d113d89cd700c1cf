"""Weights in the dtype of a product: `pixelfly::round_weights`, or casts where those do as well.

The schema is defined in csrc/torch/library.cpp, the CUDA kernel beside it. Casting weight by weight
costs the host about as much as the product's own launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .device import plain_on_cuda

_HALVES = (torch.bfloat16, torch.float16)
_round_op = torch.ops.pixelfly.round_weights.default


def round_weights(
    dtype: torch.dtype, *weights: torch.Tensor | None, tile: int = 0
) -> list[torch.Tensor | None]:
    """Returns the weights in `dtype`, contiguous: exactly what `.to` makes of them.

    On CUDA one launch does it, but in compiled code, where inductor fuses casts. Autograd does not
    see it: to be called where nothing is recorded.

    Args:
        dtype: the product's.
        weights: of any shape and dtype; None stays None.
        tile: where not 0, matrices `[n, k]` come as the blocks of a layout that keeps every one:
            `[ceil(n / tile) * ceil(k / tile), tile, tile]`, zero beyond the matrix.
    """
    changed = [w for w in weights if w is not None and (tile or w.dtype != dtype)]
    if changed and _kernel_serves(dtype, changed):
        rounded = iter(_round_op([w.contiguous() for w in changed], dtype, tile))
    else:
        rounded = (_tiled(w.to(dtype), tile) for w in changed)
    return [
        None if w is None else next(rounded) if tile or w.dtype != dtype else w.contiguous()
        for w in weights
    ]


def _kernel_serves(dtype: torch.dtype, weights: list[torch.Tensor]) -> bool:
    if dtype not in _HALVES or not plain_on_cuda(weights):
        return False
    device = weights[0].device
    for w in weights:
        if w.device != device or (w.dtype != torch.float32 and w.dtype != dtype):
            return False
    return True


def _tiled(weight: torch.Tensor, tile: int) -> torch.Tensor:
    if not tile or weight.dim() != 2:
        return weight.contiguous()
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % tile, 0, -n % tile))
    tiles = padded.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).transpose(1, 2)
    return tiles.reshape(-1, tile, tile).contiguous()


def _fake(weights, dtype, tile):
    shapes = [
        (-(-w.shape[0] // tile) * -(-w.shape[1] // tile), tile, tile)
        if tile and w.dim() == 2
        else w.shape
        for w in weights
    ]
    return [w.new_empty(s, dtype=dtype) for w, s in zip(weights, shapes, strict=True)]


def _cpu(weights, dtype, tile):
    # An operator's results are fresh tensors, even where there is nothing to do.
    rounded = [w.to(dtype, copy=True) for w in weights]
    return [_tiled(w, tile) for w in rounded]


def register(library: torch.library.Library) -> None:
    """Attaches the fake and the CPU kernel; called once, on import."""
    torch.library.register_fake("pixelfly::round_weights", _fake)
    library.impl("round_weights", _cpu, "CPU")
