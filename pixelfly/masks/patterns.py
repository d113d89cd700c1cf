"""Generators of block layouts.

Patterns are defined on the square block grid of the matrix's smaller side and stretched along the
larger one: block (i, j) of an R x C grid is kept if cell (i · P // R, j · P // C) of the P x P
pattern is, P = min(R, C). That is how a pattern serves matrices that are not square.
"""

from __future__ import annotations

import math

import torch

from .layout import BlockLayout, check_int, check_sizes, grid_shape, is_int


def _stretched(square: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    size = square.shape[0]
    i = torch.arange(rows, device="cpu") * size // rows
    j = torch.arange(cols, device="cpu") * size // cols
    # Indexing would start torch's threads, which cost more than the copy.
    return square.index_select(0, i).index_select(1, j)


def _layout(square: torch.Tensor, out_features: int, in_features: int, block_size: int):
    rows, cols = grid_shape(out_features, in_features, block_size)
    grid = _stretched(square, rows, cols)
    return BlockLayout.from_grid(grid, block_size, out_features, in_features)


def _side(name: str, out_features: int, in_features: int, block_size: int) -> int:
    check_sizes(name, out_features, in_features, block_size)
    return min(grid_shape(out_features, in_features, block_size))


def _check_range(name: str, label: str, value: int, low: int, high: int) -> None:
    check_int(name, label, value)
    if not low <= value <= high:
        raise ValueError(f"{name}: {label} must lie in {low}..{high}, got {value}")


def _distances(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(size, device="cpu")
    return index[:, None], index[None, :]


def _butterfly(size: int, max_stride: int | None) -> torch.Tensor:
    """Cells with i == j or i XOR j in {1, 2, ..., max_stride / 2}, on a grid padded to 2^k."""
    padded = 1 << max(size - 1, 0).bit_length()
    limit = padded if max_stride is None else max_stride
    if not is_int(limit) or limit < 1 or limit & (limit - 1):
        raise ValueError(
            f"flat_block_butterfly: max_stride must be a power of two, got {max_stride!r}"
        )
    if limit > padded:
        raise ValueError(
            f"flat_block_butterfly: max_stride must be at most {padded} on a grid of {size}, got "
            f"{max_stride}"
        )
    i, j = _distances(size)
    distance = i ^ j
    return (distance < limit) & ((distance & (distance - 1)) == 0)


def flat_block_butterfly(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    max_stride: int | None = None,
    grid_size: int | None = None,
    global_width: int = 0,
    shuffle: bool = False,
) -> BlockLayout:
    """Flat block butterfly: the sum of butterfly factors up to a stride, in whole blocks.

    On a P x P grid the kept blocks are i == j and i XOR j in {1, 2, 4, ..., max_stride / 2}, so a
    block row keeps `1 + log2(max_stride)` blocks.

    Args:
        out_features: N, a multiple of 8.
        in_features: K, a multiple of 8.
        block_size: 16, 32, 64 or 128.
        max_stride: largest stride of the butterfly, a power of two; None: all of them. 1 keeps the
            block diagonal.
        grid_size: None: P is the number of blocks along the smaller side, padded to a power of two
            and truncated. An integer: the research code's definition, a pattern on
            `grid_size x grid_size` cells of features that need not be whole blocks, covered by
            blocks afterwards (its density can grow: compare `nominal_density` and `density`).
        global_width: this many leading output and input features are kept densely.
        shuffle: permute the columns of the pattern as the research code does (needs grid_size).

    Raises:
        ValueError: a size that does not fit, named with what was expected.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.2, and its research code.

    Example:
        >>> flat_block_butterfly(1024, 4096, block_size=64).nnz
        320
    """
    size = _side("flat_block_butterfly", out_features, in_features, block_size)
    narrow = min(out_features, in_features)
    _check_range("flat_block_butterfly", "global_width", global_width, 0, narrow)
    if grid_size is not None:
        return _research(
            out_features, in_features, block_size, max_stride, grid_size, global_width, shuffle
        )
    if shuffle:
        raise ValueError("flat_block_butterfly: shuffle needs grid_size")
    layout = _layout(_butterfly(size, max_stride), out_features, in_features, block_size)
    return _with_global("flat_block_butterfly", layout, global_width)


def _with_global(name: str, layout: BlockLayout, width: int | None) -> BlockLayout:
    """The layout and `global_` of that width; its nominal density counts the features asked for."""
    n, k, b = layout.out_features, layout.in_features, layout.block_size
    width = min(b, n, k) if width is None else width
    _check_range(name, "global_width", width, 0, min(n, k))
    if width == 0:
        return layout
    union = layout | global_(n, k, block_size=b, width=width)

    def outside(count: int, features: int) -> torch.Tensor:
        """Features of each block that are not global ones."""
        begin = torch.arange(count, device="cpu") * b
        return ((begin + b).clamp(max=features) - begin.clamp(min=width)).clamp(min=0)

    rows, cols = layout.grid.shape
    kept = outside(rows, n) @ layout.grid.long() @ outside(cols, k)
    nominal = (int(kept) + width * (n + k) - width**2) / (n * k)
    return BlockLayout.from_grid(union.grid, b, n, k, nominal_density=nominal)


def _research(
    out_features: int,
    in_features: int,
    block_size: int,
    max_stride: int | None,
    grid_size: int,
    global_width: int,
    shuffle: bool,
) -> BlockLayout:
    """The research code's layout: P x P pattern, stretched, with global parts, block cover."""
    check_int("flat_block_butterfly", "grid_size", grid_size)
    if grid_size < 1 or grid_size & (grid_size - 1):
        raise ValueError(f"flat_block_butterfly: grid_size must be a power of two, got {grid_size}")
    if out_features % grid_size or in_features % grid_size:
        raise ValueError(
            f"flat_block_butterfly: grid_size must divide out_features={out_features} and "
            f"in_features={in_features}, got {grid_size}"
        )
    pattern = _butterfly(grid_size, max_stride)
    if shuffle:
        groups = grid_size // (grid_size if max_stride is None else max_stride)
        columns = torch.arange(grid_size, device="cpu").view(groups, -1).T.reshape(-1)
        pattern = pattern[:, columns]
    # Ranges of cells that each block row and column touches: no element-level mask is needed.
    rows, cols = grid_shape(out_features, in_features, block_size)

    def touched(count: int, features: int) -> torch.Tensor:
        cell = features // grid_size
        begin = torch.arange(count, device="cpu") * block_size
        last = (begin + block_size - 1).clamp(max=features - 1)
        cells = torch.arange(grid_size, device="cpu")
        return (cells >= (begin // cell)[:, None]) & (cells <= (last // cell)[:, None])

    cover = touched(rows, out_features).float() @ pattern.float()
    grid = cover @ touched(cols, in_features).float().T > 0
    wide = -(-global_width // block_size)
    grid[:wide] = True
    grid[:, :wide] = True
    nominal = pattern.float().mean().item()
    if global_width:
        # Outside the global rows and columns the pattern keeps its own share of elements.
        mask = pattern.repeat_interleave(out_features // grid_size, 0)
        mask = mask.repeat_interleave(in_features // grid_size, 1)
        mask[:global_width] = True
        mask[:, :global_width] = True
        nominal = mask.float().mean().item()
    return BlockLayout.from_grid(
        grid, block_size, out_features, in_features, nominal_density=nominal
    )


def dense(out_features: int, in_features: int, *, block_size: int = 64) -> BlockLayout:
    """Every block is kept."""
    size = _side("dense", out_features, in_features, block_size)
    return _layout(
        torch.ones(size, size, dtype=torch.bool, device="cpu"),
        out_features,
        in_features,
        block_size,
    )


def block_diagonal(out_features: int, in_features: int, *, block_size: int = 64) -> BlockLayout:
    """The stretched diagonal: every output block reads the inputs of its own position alone."""
    size = _side("block_diagonal", out_features, in_features, block_size)
    return _layout(
        torch.eye(size, dtype=torch.bool, device="cpu"), out_features, in_features, block_size
    )


def local(
    out_features: int, in_features: int, *, block_size: int = 64, window: int = 1
) -> BlockLayout:
    """A band: blocks at most `window` cells off the stretched diagonal (0: block diagonal)."""
    size = _side("local", out_features, in_features, block_size)
    check_int("local", "window", window)
    if window < 0:
        raise ValueError(f"local: window must not be negative, got {window}")
    i, j = _distances(size)
    return _layout((i - j).abs() <= window, out_features, in_features, block_size)


def global_(
    out_features: int, in_features: int, *, block_size: int = 64, width: int | None = None
) -> BlockLayout:
    """The low-rank term in its global form: the first output and input features are kept densely.

    Args:
        width: features, covered by whole blocks; default one block, or the smaller side if that is
            less. A width w has the parameters of rank w and rank at most 2w.
    """
    check_sizes("global_", out_features, in_features, block_size)
    narrow = min(out_features, in_features)
    width = min(block_size, narrow) if width is None else width
    _check_range("global_", "width", width, 1, narrow)
    grid = torch.zeros(
        grid_shape(out_features, in_features, block_size), dtype=torch.bool, device="cpu"
    )
    wide = -(-width // block_size)
    grid[:wide] = True
    grid[:, :wide] = True
    nominal = (width * (out_features + in_features) - width**2) / (out_features * in_features)
    return BlockLayout.from_grid(
        grid, block_size, out_features, in_features, nominal_density=nominal
    )


def random(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    blocks_per_row: int = 1,
    seed: int = 0,
) -> BlockLayout:
    """Random blocks, exactly `blocks_per_row` in every block row; a seed gives one layout."""
    check_sizes("random", out_features, in_features, block_size)
    rows, cols = grid_shape(out_features, in_features, block_size)
    _check_range("random", "blocks_per_row", blocks_per_row, 1, cols)
    _check_range("random", "seed", seed, -(2**63), 2**64 - 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, cols, generator=generator, device="cpu").argsort(1)
    grid = torch.zeros(rows, cols, dtype=torch.bool, device="cpu")
    grid.scatter_(1, order[:, :blocks_per_row], True)
    return BlockLayout.from_grid(grid, block_size, out_features, in_features)


def longformer(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    window: int = 1,
    global_width: int | None = None,
) -> BlockLayout:
    """A band and global rows and columns (Longformer, Beltagy et al. 2020).

    Args:
        window: as of `local`.
        global_width: as the width of `global_`; 0: none.
    """
    banded = local(out_features, in_features, block_size=block_size, window=window)
    return _with_global("longformer", banded, global_width)


def bigbird(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    window: int = 1,
    global_width: int | None = None,
    random_blocks: int = 1,
    seed: int = 0,
) -> BlockLayout:
    """A band, global rows and columns, and random blocks (BigBird, Zaheer et al. 2020).

    Args:
        window: as of `local`.
        global_width: as the width of `global_`; 0: none.
        random_blocks: in every block row, as of `random`; 0: none.
        seed: as of `random`.
    """
    size = {"block_size": block_size}
    kept = local(out_features, in_features, **size, window=window)
    _check_range("bigbird", "random_blocks", random_blocks, 0, kept.grid.shape[1])
    if random_blocks:
        kept |= random(out_features, in_features, **size, blocks_per_row=random_blocks, seed=seed)
    return _with_global("bigbird", kept, global_width)


def strided(
    out_features: int, in_features: int, *, block_size: int = 64, stride: int | None = None
) -> BlockLayout:
    """Stripes: cells whose distance from the diagonal is a multiple of `stride`.

    Args:
        stride: cells between stripes; default the square root of the grid's side, rounded.
    """
    size = _side("strided", out_features, in_features, block_size)
    stride = max(1, round(math.sqrt(size))) if stride is None else stride
    check_int("strided", "stride", stride)
    if not 1 <= stride:
        raise ValueError(f"strided: stride must be at least 1, got {stride}")
    i, j = _distances(size)
    return _layout((i - j) % stride == 0, out_features, in_features, block_size)
