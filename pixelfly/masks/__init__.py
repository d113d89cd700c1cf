"""Which blocks of a weight matrix are kept: `BlockLayout` and the generators that make one."""

from __future__ import annotations

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
    "BlockLayout",
    "bigbird",
    "block_diagonal",
    "dense",
    "flat_block_butterfly",
    "global_",
    "local",
    "longformer",
    "random",
    "strided",
]
