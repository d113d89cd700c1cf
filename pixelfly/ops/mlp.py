"""`butterfly_mlp`: two layers that share the derivative of the activation between them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..masks import BlockLayout
from .functional import linear


class Weights(NamedTuple):
    """What `butterfly_lowrank_mm` multiplies with: see there for shapes."""

    blocks: torch.Tensor
    layout: BlockLayout
    u: torch.Tensor | None = None
    v: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def butterfly_mlp(
    x: torch.Tensor,
    first: Weights,
    second: Weights,
    *,
    activation: str | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies two layers with an activation between: `second(act(first(x))) + residual`.

    Computes what two calls of `butterfly_lowrank_mm` do. Its backward saves a pass over the hidden
    activations: the second layer's kernel applies the activation's derivative where it writes its
    input's gradient. In bfloat16 that derivative is kept as a byte an element, in steps of 1/200.

    Args:
        x: `[..., K]`, dtypes as in `butterfly_lowrank_mm`.
        first: weights from K to H features.
        second: weights from H to N features.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: `[..., N]`, added to the output, or None.

    Returns:
        `[..., N]` in x's dtype (autocast's inside an autocast region).

    Raises:
        TypeError: as `butterfly_lowrank_mm`.
        ValueError: as `butterfly_lowrank_mm`.
        RuntimeError: as `butterfly_lowrank_mm`.

    Example:
        >>> import torch
        >>> from pixelfly.masks import flat_block_butterfly
        >>> from pixelfly.ops import Weights, butterfly_mlp
        >>> up = flat_block_butterfly(256, 128, block_size=32)
        >>> down = flat_block_butterfly(128, 256, block_size=32)
        >>> first = Weights(torch.randn(up.nnz, 32, 32) / 8, up)
        >>> second = Weights(torch.randn(down.nnz, 32, 32) / 8, down)
        >>> butterfly_mlp(torch.randn(3, 128), first, second, activation="gelu").shape
        torch.Size([3, 128])
    """
    # ReLU's derivative is read off its output instead: nothing but that output is kept.
    shared = activation not in (None, "relu")
    hidden, slope = linear(x, *first, activation, give_slope=shared)
    return linear(hidden, *second, None, residual, x_slope=slope)[0]
