"""Which layout and rank a layer gets for a density: the rule of the paper's section 3.3.

A quarter to a third of the weights goes to the low-rank term, in units the kernels like; the rest
goes to the butterfly with the largest stride that fits. What is taken is never above the budget.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..masks import BLOCK_SIZES, BlockLayout, flat_block_butterfly
from ..masks.layout import is_int

RANK_UNIT = 16  # the smallest supported block
MIN_SHARE, MAX_SHARE = 1 / 4, 1 / 3  # of the weights, for the low-rank term
LOWRANK_FORMS = ("factored", "global")


@dataclass(frozen=True)
class Choice:
    """What a layer is made of.

    Attributes:
        layout: the kept blocks, dense block rows and columns of a global low rank included.
        rank: r of the factored term, or the width in features of the global one; 0 is none.
        lowrank: "factored" or "global".
        requested: the density that was asked for, or None.
        note: what the choice could not give, in words; empty if nothing.
    """

    layout: BlockLayout
    rank: int
    lowrank: str = "factored"
    requested: float | None = None
    note: str = ""

    @property
    def factored_rank(self) -> int:
        return self.rank if self.lowrank == "factored" else 0

    @functools.cached_property
    def block_weights(self) -> int:
        """Weights inside the kept blocks, without what sticks out past the layer's features."""
        return kept_weights(self.layout)

    @property
    def lowrank_weights(self) -> int:
        """Weights of `u` and `v`."""
        return self.factored_rank * (self.layout.out_features + self.layout.in_features)

    @property
    def density(self) -> float:
        """Weights of the layer / weights of the dense layer."""
        dense = self.layout.out_features * self.layout.in_features
        return (self.block_weights + self.lowrank_weights) / dense


def kept_fan_in(layout: BlockLayout) -> torch.Tensor:
    """Returns how many inputs each block row reads, `[rows]` float64; tails count what exists."""
    widths = _sizes(layout.in_features, layout.block_size)
    return layout.grid.cpu().double() @ widths


def kept_weights(layout: BlockLayout) -> int:
    """Returns how many entries of the `[N, K]` weight lie in kept blocks."""
    return int(kept_fan_in(layout) @ _sizes(layout.out_features, layout.block_size))


def _sizes(features: int, block_size: int) -> torch.Tensor:
    sizes = torch.full((-(-features // block_size),), block_size, dtype=torch.float64, device="cpu")
    sizes[-1] -= len(sizes) * block_size - features
    return sizes


def choose(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    density: float | None = None,
    max_stride: int | None = None,
    rank: int | None = None,
    lowrank: str = "factored",
    layout: BlockLayout | None = None,
) -> Choice:
    """Picks the layout and the rank of a layer.

    With `density`, rank and stride share `density * N * K` weights. To each rank, a multiple of 16
    (of the block size in global form), belongs the butterfly with the largest stride that fits
    the rest; taken is the pair that leaves least of the budget over and gives the low rank a share
    nearest to the range of a quarter to a third. Where even the full butterfly leaves weights over,
    its pattern is drawn in cells of 2x2, 4x4, ... blocks. Without `density`, the butterfly has
    `max_stride` (None: the full one) and the rank takes at most a third of all weights.

    Args:
        out_features: N, a multiple of 8.
        in_features: K, a multiple of 8.
        block_size: b, 16, 32, 64 or 128.
        density: weights of the layer / weights of the dense layer, in (0, 1].
        max_stride: fixes the butterfly's stride, a power of two; rank takes the rest.
        rank: fixes the rank; 0 is no low rank.
        lowrank: "factored" (`u`, `v`) or "global" (dense block rows and columns).
        layout: kept blocks, instead of a butterfly; excludes `density` and `max_stride`.

    Returns:
        The choice; its density is the requested one or the nearest not above it that blocks reach
        beside its rank. Another rank, or none, may come nearer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the density is not reachable; the message names
            the nearest that is.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3.

    Example:
        >>> choice = choose(3072, 768, density=0.25)
        >>> choice.rank, choice.layout.nnz, round(choice.density, 4)
        (48, 96, 0.2448)
        >>> choose(3072, 768, density=0.25, rank=0).density
        0.25
    """
    _check(out_features, in_features, block_size, density, rank, lowrank, layout, max_stride)
    return _choose(
        out_features, in_features, block_size, density, max_stride, rank, lowrank, layout
    )


@functools.lru_cache(maxsize=512)
def _choose(
    out_features: int,
    in_features: int,
    block_size: int,
    density: float | None,
    max_stride: int | None,
    rank: int | None,
    lowrank: str,
    layout: BlockLayout | None,
) -> Choice:
    search = _Search(out_features, in_features, block_size, max_stride, lowrank)
    if density is None:
        if layout is None:
            layout = search.butterfly(max_stride, 1)
        if rank is None:
            rank = search.rank_beside(kept_weights(layout))
        if lowrank == "global":
            layout = search.with_global(layout, rank)
        return Choice(layout, rank, lowrank)

    if rank is not None:
        best = search.best(density, rank)
    else:
        fitting = [c for r in search.ranks(density) if (c := search.best(density, r)) is not None]
        best = min(fitting, key=search.loss, default=None)
        if best is None and (best := search.best(density, 0)) is not None:
            note = f"no low rank: rank {search.unit} and one block a row are above the density"
            best = replace(best, note=note)
    if best is None:
        raise ValueError(search.unreachable(density, rank))
    return best


@dataclass(eq=False)
class _Search:
    """The layouts and ranks a layer can have."""

    out_features: int
    in_features: int
    block_size: int
    max_stride: int | None
    lowrank: str
    _levels: list[list[BlockLayout]] = field(default_factory=list)
    _kept: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def dense(self) -> int:
        return self.out_features * self.in_features

    @property
    def unit(self) -> int:
        return self.block_size if self.lowrank == "global" else RANK_UNIT

    @property
    def rank_limit(self) -> int:
        return min(self.out_features, self.in_features)

    def butterfly(self, max_stride: int | None, cell: int) -> BlockLayout:
        """Returns the flat butterfly drawn in cells of `cell` x `cell` blocks."""
        n, k, b = self.out_features, self.in_features, self.block_size
        if cell == 1:
            return flat_block_butterfly(n, k, block_size=b, max_stride=max_stride)
        rows, cols = -(-n // b), -(-k // b)
        coarse = flat_block_butterfly(
            -(-rows // cell) * b, -(-cols // cell) * b, block_size=b, max_stride=max_stride
        ).grid
        grid = coarse.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return BlockLayout.from_grid(grid[:rows, :cols].contiguous(), b, n, k)

    def butterflies(self) -> Iterator[list[BlockLayout]]:
        """Yields, for cells of 1, 2, 4, ... blocks, the butterflies from sparse to dense."""
        side = -(-self.rank_limit // self.block_size)
        level, cell = 0, 1
        while True:
            if level == len(self._levels):  # made when first asked for: most budgets need one
                full = (-(-side // cell) - 1).bit_length()
                strides = [2**i for i in range(full + 1)]
                if self.max_stride is not None:
                    strides = [self.max_stride]
                self._levels.append([self.butterfly(stride, cell) for stride in strides])
            yield self._levels[level]
            if cell >= side or self.max_stride is not None:
                return
            level, cell = level + 1, cell * 2

    def with_global(self, layout: BlockLayout, width: int) -> BlockLayout:
        """Returns the layout with the first `width` output and input features dense."""
        if width == 0:
            return layout
        grid = layout.grid.clone()
        wide = -(-width // layout.block_size)
        grid[:wide] = True
        grid[:, :wide] = True
        return BlockLayout.from_grid(
            grid, layout.block_size, layout.out_features, layout.in_features
        )

    def weights(self, layout: BlockLayout, rank: int) -> int:
        """Returns how many weights a layer of this butterfly and this rank has."""
        if self.lowrank == "global":
            key = (id(layout), rank)
            if key not in self._kept:
                wide = -(-rank // self.block_size)
                # What the global rows and columns cover is not counted twice.
                heights = _sizes(self.out_features, self.block_size)
                widths = _sizes(self.in_features, self.block_size)
                rest = heights[wide:] @ layout.grid[wide:, wide:].double() @ widths[wide:]
                outside = int(heights[wide:].sum() * widths[wide:].sum())
                self._kept[key] = int(rest) + self.dense - outside
            return self._kept[key]
        key = (id(layout), 0)
        if key not in self._kept:
            self._kept[key] = kept_weights(layout)
        return self._kept[key] + rank * (self.out_features + self.in_features)

    def best(self, density: float, rank: int) -> Choice | None:
        """Returns the densest choice not above the density, the finest of equals, or None."""
        budget = density * self.dense * (1 + 1e-9)
        best, best_weights = None, -1
        for layouts in self.butterflies():
            for layout in layouts:
                weights = self.weights(layout, rank)
                if best_weights < weights <= budget:
                    best, best_weights = layout, weights
            # Coarser cells serve only budgets that the full butterfly does not use up.
            if weights > budget:
                break
        if best is None:
            return None
        if self.lowrank == "global":
            best = self.with_global(best, rank)
        return Choice(best, rank, self.lowrank, density)

    def ranks(self, density: float) -> range:
        """Returns the ranks to try: the smallest, and all that take up to half the weights."""
        half = density * self.dense / 2 / (self.out_features + self.in_features)
        top = min(max(int(half + 1e-9), self.unit), self.rank_limit)
        return range(self.unit, top + 1, self.unit)

    def loss(self, choice: Choice) -> tuple[float, int]:
        """Says how far a choice is from the rule: weights left over + low-rank share off range."""
        lowrank = choice.lowrank_weights
        if self.lowrank == "global":
            lowrank = choice.rank * (self.out_features + self.in_features - choice.rank)
        total = choice.density * self.dense
        share = lowrank / total
        off_range = max(MIN_SHARE - share, share - MAX_SHARE, 0)
        # Rounded, so that of equals the one with more butterfly wins.
        return round(1 - choice.density / choice.requested + off_range, 9), choice.rank

    def rank_beside(self, block_weights: int) -> int:
        """Returns the rank that takes at most a third of all weights beside the blocks."""
        rank = block_weights * MAX_SHARE / (1 - MAX_SHARE) / (self.out_features + self.in_features)
        return min(int(rank + 1e-9), self.rank_limit) // self.unit * self.unit

    def unreachable(self, density: float, rank: int | None) -> str:
        sparsest = self.butterfly(self.max_stride or 1, 1)
        if self.lowrank == "global":
            sparsest = self.with_global(sparsest, rank or 0)
        choice = Choice(sparsest, rank or 0, self.lowrank)
        message = (
            f"density={density:g} is not reachable for in_features={self.in_features}, "
            f"out_features={self.out_features} at block_size={self.block_size}"
        )
        if rank:
            message += f", rank={rank}"
        if self.max_stride is not None:
            message += f", max_stride={self.max_stride}"
        if choice.density > 1:
            room = (density * self.dense - kept_weights(self.butterfly(1, 1))) / (
                self.out_features + self.in_features
            )
            fitting = max(0, int(room) // self.unit * self.unit)
            return message + f"; the largest rank that leaves room for blocks is {fitting}"
        message += f"; the nearest reachable is {choice.density:.4g}"
        if self.block_size > RANK_UNIT and self.max_stride is None:
            finer = _Search(
                self.out_features, self.in_features, RANK_UNIT, None, self.lowrank
            ).butterfly(1, 1)
            finest = Choice(finer, choice.factored_rank).density
            message += f", or {finest:.4g} at block_size={RANK_UNIT}"
            message += " without global blocks" if rank and self.lowrank == "global" else ""
        return message


def _check(
    out_features: int,
    in_features: int,
    block_size: int,
    density: float | None,
    rank: int | None,
    lowrank: str,
    layout: BlockLayout | None,
    max_stride: int | None,
) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value <= 0 or value % 8:
            raise ValueError(f"{name} must be a positive multiple of 8, got {value}")
    if lowrank not in LOWRANK_FORMS:
        raise ValueError(f"lowrank must be 'factored' or 'global', got {lowrank!r}")
    if density is not None:
        if not isinstance(density, (int, float)) or isinstance(density, bool):
            raise TypeError(f"density must be a number or None, got {type(density).__name__}")
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
    if layout is not None:
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout or None, got {type(layout).__name__}")
        shape = (layout.out_features, layout.in_features)
        if shape != (out_features, in_features):
            raise ValueError(
                "layout must be for out_features, in_features = "
                f"{(out_features, in_features)}, got one for {shape}"
            )
        if density is not None or max_stride is not None:
            name = "max_stride" if density is None else "density"
            raise ValueError(f"layout excludes {name}: the layout says which blocks are kept")
        block_size = layout.block_size
    if not is_int(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be 16, 32, 64 or 128, got {block_size!r}")
    if density is not None and max_stride is not None and rank is not None:
        raise ValueError("density, max_stride and rank cannot all be given: two fix the third")
    _check_rank(out_features, in_features, block_size, rank, lowrank)


def _check_rank(
    out_features: int, in_features: int, block_size: int, rank: int | None, lowrank: str
) -> None:
    if rank is None:
        return
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an int or None, got {type(rank).__name__}")
    if not 0 <= rank <= min(out_features, in_features):
        raise ValueError(
            "rank must be between 0 and min(in_features, out_features)="
            f"{min(out_features, in_features)}, got {rank}"
        )
    if lowrank == "global" and rank % block_size:
        raise ValueError(
            f"rank must be a multiple of block_size={block_size} with lowrank='global', got {rank}"
        )
