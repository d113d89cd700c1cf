"""`AttentionLayout`: which blocks of an attention's score matrix are computed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .layout import boolean_grid, is_int

ATTENTION_BLOCK_SIZES = (16, 32, 64, 128)


class AttentionLayout:
    """Kept blocks of a `[q_len, kv_len]` score matrix, per head or for all heads alike.

    Immutable, hashable, equal if the blocks are. Lengths need not be multiples of the block size:
    the last blocks then reach past the sequence. Nothing of the size of the scores is ever stored.

    Attributes:
        q_len, kv_len: tokens.
        block_size: b; a block is b queries x b keys.
        grid: bool `[heads, ceil(q_len / b), ceil(kv_len / b)]` on the CPU; one head stands for all.

    Example:
        >>> from pixelfly.masks import butterfly_attention_layout
        >>> layout = butterfly_attention_layout(1000, block_size=64, causal=True)
        >>> layout
        AttentionLayout(1000x1000, block_size=64, heads=1, grid 16x16, density 23.1%)
    """

    q_len: int
    kv_len: int
    block_size: int
    grid: torch.Tensor

    def __init__(self, q_len: int, kv_len: int, block_size: int, grid: torch.Tensor) -> None:
        self.__dict__.update(q_len=q_len, kv_len=kv_len, block_size=block_size, grid=grid)
        # Whoever needs them may be tracing, where a tensor has no data.
        _ = self._hash, self.is_causal

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"AttentionLayout is immutable: cannot set {name}")

    @classmethod
    def from_grid(
        cls, grid: Any, block_size: int, q_len: int | None = None, kv_len: int | None = None
    ) -> AttentionLayout:
        """Makes a layout from a boolean grid of blocks.

        Args:
            grid: bool `[q blocks, kv blocks]` or `[heads, q blocks, kv blocks]`.
            block_size: 16, 32, 64 or 128.
            q_len: queries; default `q blocks * block_size`.
            kv_len: keys; default `kv blocks * block_size`.

        Raises:
            TypeError: grid is not boolean.
            ValueError: sizes do not fit together.
        """
        grid = boolean_grid("AttentionLayout", grid)
        grid = grid.unsqueeze(0) if grid.dim() == 2 else grid
        if grid.dim() != 3 or 0 in grid.shape:
            raise ValueError(
                "AttentionLayout: grid must be [q blocks, kv blocks] or [heads, q blocks, kv "
                f"blocks], got shape {tuple(grid.shape)}"
            )
        _check_block_size(block_size)
        _, rows, cols = grid.shape
        q_len = rows * block_size if q_len is None else q_len
        kv_len = cols * block_size if kv_len is None else kv_len
        expected = (-(-q_len // block_size), -(-kv_len // block_size))
        if q_len <= 0 or kv_len <= 0 or expected != (rows, cols):
            raise ValueError(
                f"AttentionLayout: {q_len}x{kv_len} tokens in blocks of {block_size} need a grid "
                f"of {expected[0]}x{expected[1]}, got {rows}x{cols}"
            )
        return cls(q_len, kv_len, block_size, grid.detach().cpu().clone())

    @classmethod
    def per_head(cls, layouts: Sequence[AttentionLayout]) -> AttentionLayout:
        """Stacks layouts of one size, one for each head."""
        if not layouts or any(layout.heads != 1 for layout in layouts):
            raise ValueError("AttentionLayout.per_head: expected one or more layouts of one head")
        first = layouts[0]
        if any(layout._sizes != first._sizes for layout in layouts):
            raise ValueError("AttentionLayout.per_head: layouts must have one size and block size")
        return cls(*first._sizes, torch.cat([layout.grid for layout in layouts]))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.q_len, self.kv_len, self.block_size

    @property
    def heads(self) -> int:
        """Heads with layouts of their own; 1: one layout for any number of heads."""
        return self.grid.shape[0]

    @functools.cached_property
    def density(self) -> float:
        """Kept scores / all scores, counting the part of the last blocks inside the sequence."""
        b = self.block_size
        rows = _extents(self.q_len, b, self.grid.shape[1])
        cols = _extents(self.kv_len, b, self.grid.shape[2])
        kept = (self.grid.double() @ cols) @ rows
        return kept.mean().item() / (self.q_len * self.kv_len)

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether no kept block lies wholly after its queries."""
        return self.q_len == self.kv_len and not self.grid.triu(1).any().item()

    @functools.cached_property
    def row_groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Block rows that keep equally many key blocks: `[R]` rows of (head, query block),
        flattened, and their `[R, d]` key blocks; rows that keep none are left out."""
        groups = []
        # Whatever mode the caller is in, they are plain tensors that later calls can use.
        with _disable_current_modes(), torch.inference_mode(False):
            flat = self.grid.flatten(0, 1)
            counts = flat.sum(1)
            for d in counts.unique().tolist():
                if d:
                    which = (counts == d).nonzero().flatten()
                    groups.append((which, flat[which].nonzero()[:, 1].reshape(len(which), d)))
        return groups

    def causal(self) -> AttentionLayout:
        """Drops the blocks that lie wholly after their queries."""
        if self.q_len != self.kv_len:
            raise ValueError(
                "AttentionLayout.causal: expected as many queries as keys, got "
                f"{self.q_len} and {self.kv_len}"
            )
        return self if self.is_causal else AttentionLayout(*self._sizes, self.grid.tril())

    def to_dense(self) -> torch.Tensor:
        """Returns the bool `[heads, q_len, kv_len]` mask of kept scores; for tests and plots."""
        b = self.block_size
        mask = self.grid.repeat_interleave(b, 1).repeat_interleave(b, 2)
        return mask[:, : self.q_len, : self.kv_len]

    def _combine(self, other: object, op: Any) -> AttentionLayout:
        if not isinstance(other, AttentionLayout):
            return NotImplemented
        if (
            self._sizes != other._sizes
            or self.heads != other.heads
            and 1
            not in (
                self.heads,
                other.heads,
            )
        ):
            raise ValueError(
                "attention layouts to combine must have one size, block size and number of heads, "
                f"got {self!r} and {other!r}"
            )
        return AttentionLayout(*self._sizes, op(self.grid, other.grid))

    def __or__(self, other: object) -> AttentionLayout:
        return self._combine(other, torch.logical_or)

    def __and__(self, other: object) -> AttentionLayout:
        return self._combine(other, torch.logical_and)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((*self._sizes, self.grid.shape, self.grid.numpy().tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionLayout):
            return NotImplemented
        return self is other or (
            self._hash == other._hash
            and self._sizes == other._sizes
            and torch.equal(self.grid, other.grid)
        )

    def __repr__(self) -> str:
        _, rows, cols = self.grid.shape
        return (
            f"AttentionLayout({self.q_len}x{self.kv_len}, block_size={self.block_size}, "
            f"heads={self.heads}, grid {rows}x{cols}, density {100 * self.density:.1f}%)"
        )

    def plot(self, ax: Any = None, head: int = 0) -> Any:
        """Draws one head's grid of kept blocks; returns the matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.imshow(self.grid[head].numpy(), cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
        ax.set_xlabel(f"key block (of {self.block_size} tokens)")
        ax.set_ylabel(f"query block (of {self.block_size} tokens)")
        ax.set_title(f"{self.q_len}x{self.kv_len}, density {100 * self.density:.1f}%")
        return ax


def _extents(length: int, block_size: int, count: int) -> torch.Tensor:
    """Tokens of each block that lie inside the sequence."""
    starts = torch.arange(count, dtype=torch.float64, device="cpu") * block_size
    return (length - starts).clamp(max=block_size)


def _check_block_size(block_size: int) -> None:
    if not is_int(block_size) or block_size not in ATTENTION_BLOCK_SIZES:
        raise ValueError(
            f"attention layouts: block_size must be one of {ATTENTION_BLOCK_SIZES}, "
            f"got {block_size!r}"
        )


def butterfly_attention_layout(
    q_len: int,
    kv_len: int | None = None,
    *,
    block_size: int = 128,
    max_stride: int | None = None,
    global_blocks: int = 1,
    local_blocks: int = 0,
    causal: bool = False,
) -> AttentionLayout:
    """Returns flat block butterfly + global blocks + a local window over queries x keys.

    Keeps block (i, j) if i == j or i XOR j is a power of two below `max_stride`, if i or j is one
    of the first `global_blocks` (the method's low-rank part), or if |i - j| <= `local_blocks`.

    Args:
        q_len: queries.
        kv_len: keys; default `q_len`.
        block_size: 16, 32, 64 or 128 tokens.
        max_stride: a power of two; default: the whole grid.
        global_blocks: leading blocks that see and are seen by everybody.
        local_blocks: neighbours on either side of the diagonal.
        causal: drop the blocks that lie wholly after their queries.

    Raises:
        ValueError: a size is out of range.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3 and appendix on attention.

    Example:
        >>> layout = butterfly_attention_layout(512, block_size=64, global_blocks=0)
        >>> layout.grid[0].sum(1).tolist()
        [4, 4, 4, 4, 4, 4, 4, 4]
    """
    name = "butterfly_attention_layout"
    kv_len = q_len if kv_len is None else kv_len
    _check_block_size(block_size)
    for label, size in (("q_len", q_len), ("kv_len", kv_len)):
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"{name}: {label} must be a positive int, got {size!r}")
    for label, count in (("global_blocks", global_blocks), ("local_blocks", local_blocks)):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}: {label} must be a non-negative int, got {count!r}")
    rows, cols = -(-q_len // block_size), -(-kv_len // block_size)
    full = 1 << (max(rows, cols) - 1).bit_length()
    stride = full if max_stride is None else max_stride
    if stride < 1 or stride & (stride - 1) or stride > full:
        raise ValueError(
            f"{name}: max_stride must be a power of two of at most {full}, got {max_stride}"
        )
    i, j = torch.arange(rows, device="cpu")[:, None], torch.arange(cols, device="cpu")[None, :]
    distance = i ^ j
    grid = (distance < stride) & (distance & (distance - 1) == 0)
    grid |= (i < global_blocks) | (j < global_blocks)
    grid |= (i - j).abs() <= local_blocks
    layout = AttentionLayout.from_grid(grid, block_size, q_len, kv_len)
    return layout.causal() if causal else layout
