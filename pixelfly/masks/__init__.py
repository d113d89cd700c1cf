"""Which blocks are kept: `BlockLayout` of a weight matrix, `AttentionLayout` of attention scores,
and the generators that make them."""

from __future__ import annotations

from .attention import AttentionLayout, butterfly_attention_layout
from .layout import BLOCK_SIZES, BlockLayout
from .patterns import (
    bigbird,
    block_diagonal,
    dense,
    flat_block_butterfly,
    global_,
    local,
    longformer,
    random,
    strided,
)

__all__ = [
    "BLOCK_SIZES",
    "AttentionLayout",
    "BlockLayout",
    "bigbird",
    "block_diagonal",
    "butterfly_attention_layout",
    "dense",
    "flat_block_butterfly",
    "global_",
    "local",
    "longformer",
    "random",
    "strided",
]
