"""`BlockLayout`: an immutable set of kept blocks of an `[out_features, in_features]` matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, NoReturn

import torch

BLOCK_SIZES = (16, 32, 64, 128)
_Fold = Callable[[list[float]], float]


def is_int(value: object) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, label: str, value: object) -> None:
    """Raises TypeError if an argument is not an integer."""
    if not is_int(value):
        raise TypeError(f"{name}: {label} must be an int, got {value!r}")


def check_block_size(name: str, block_size: int) -> None:
    """Raises if there are no kernels for blocks of this size."""
    if not is_int(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def check_sizes(name: str, out_features: int, in_features: int, block_size: int) -> None:
    """Raises if no layout of these sizes can exist."""
    check_block_size(name, block_size)
    for label, size in (("out_features", out_features), ("in_features", in_features)):
        if not is_int(size) or size <= 0 or size % 8:
            raise ValueError(f"{name}: {label} must be a positive multiple of 8, got {size!r}")


def boolean_grid(name: str, grid: Any) -> torch.Tensor:
    """Returns a user's grid of blocks as a CPU tensor; raises TypeError if it is not boolean."""
    try:
        grid = torch.as_tensor(grid, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: grid must be a boolean tensor or array, got {type(grid).__name__} ({error})"
        ) from error
    if grid.dtype != torch.bool:
        raise TypeError(f"{name}: grid must be boolean, got {grid.dtype}")
    return grid


def grid_shape(out_features: int, in_features: int, block_size: int) -> tuple[int, int]:
    """Block rows and block columns: the last of each may reach past the matrix."""
    return -(-out_features // block_size), -(-in_features // block_size)


def _check_grid(grid: torch.Tensor, out_features: int, in_features: int, block_size: int) -> None:
    """Raises if a grid is not the boolean CPU tensor of a matrix of these sizes."""
    if not isinstance(grid, torch.Tensor) or grid.dtype != torch.bool or grid.device.type != "cpu":
        given = type(grid).__name__
        if isinstance(grid, torch.Tensor):
            given = f"{grid.dtype} on {grid.device}"
        raise TypeError(
            f"BlockLayout: grid must be a boolean tensor on the CPU, got {given}; "
            "BlockLayout.from_grid takes others"
        )
    expected = grid_shape(out_features, in_features, block_size)
    if grid.shape != expected:
        raise ValueError(
            f"BlockLayout: a {out_features}x{in_features} matrix in blocks of {block_size} has a "
            f"grid of {expected[0]}x{expected[1]}, got {'x'.join(map(str, grid.shape))}"
        )


class BlockLayout:
    """Which blocks of a weight matrix are kept: immutable, hashable, equal if the blocks are.

    Make one with `from_grid` or a generator of `pixelfly.masks`. Combine layouts of one shape with
    `|` and `&`.

    Attributes:
        out_features: rows N of the matrix.
        in_features: columns K of the matrix.
        block_size: b; blocks are b x b.
        grid: bool `[ceil(N / b), ceil(K / b)]` on the CPU, True where a block is kept. Not to be
            written to.
        nominal_density: the fraction of weights that the pattern asked for, before it was covered
            by whole blocks. `|` and `&` keep that of the operand whose blocks the result has; other
            results have the most that the two patterns can have asked for together.

    Example:
        >>> from pixelfly.masks import block_diagonal, flat_block_butterfly
        >>> layout = flat_block_butterfly(1024, 1024, block_size=64)
        >>> layout
        BlockLayout(1024x1024, block_size=64, grid 16x16, nnz=80, density 31.2%)
        >>> (layout | block_diagonal(1024, 1024, block_size=64)) == layout
        True
    """

    out_features: int
    in_features: int
    block_size: int
    grid: torch.Tensor
    nominal_density: float
    device: torch.device
    calls: dict[Any, Any]  # pixelfly.ops.validation's: calls with this layout that were checked

    # Not a dataclass: dynamo has its own idea of frozen ones and cannot pass them as constants.
    def __init__(
        self,
        out_features: int,
        in_features: int,
        block_size: int,
        grid: torch.Tensor,
        nominal_density: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        # An index that does not fit the matrix would reach past it in a kernel.
        check_sizes("BlockLayout", out_features, in_features, block_size)
        _check_grid(grid, out_features, in_features, block_size)
        self.__dict__.update(
            out_features=out_features,
            in_features=in_features,
            block_size=block_size,
            grid=grid,
            device=torch.device("cpu") if device is None else device,
            calls={},
        )
        # Whoever needs these may be tracing, where a tensor has no data: compute them now.
        _ = self.row_indices, self.col_indices, self.nnz, self._hash
        self.__dict__["nominal_density"] = (
            self.density if nominal_density is None else nominal_density
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"BlockLayout is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"BlockLayout is immutable: cannot delete {name}")

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of bytes differ between processes, plans live on this one's devices.
        return {k: v for k, v in self.__dict__.items() if k not in ("_hash", "calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, calls={})
        self.__dict__["_hash"] = hash(self._key)

    @classmethod
    def from_grid(
        cls,
        grid: Any,
        block_size: int,
        out_features: int | None = None,
        in_features: int | None = None,
        *,
        nominal_density: float | None = None,
    ) -> BlockLayout:
        """Makes a layout from a boolean grid of blocks.

        Args:
            grid: bool `[rows, cols]`, a tensor or an array.
            block_size: 16, 32, 64 or 128.
            out_features: N, a multiple of 8 in the last block row; default `rows * block_size`.
            in_features: K, likewise; default `cols * block_size`.
            nominal_density: what the pattern asked for; default: the layout's own density.

        Raises:
            TypeError: grid is not boolean.
            ValueError: sizes do not fit together.
        """
        grid = boolean_grid("from_grid", grid)
        check_block_size("from_grid", block_size)
        if grid.dim() != 2 or 0 in grid.shape:
            raise ValueError(f"from_grid: grid must be [rows, cols], got shape {tuple(grid.shape)}")
        rows, cols = grid.shape
        out_features = rows * block_size if out_features is None else out_features
        in_features = cols * block_size if in_features is None else in_features
        grid = grid.detach().to("cpu", copy=True)
        return cls(out_features, in_features, block_size, grid, nominal_density)

    @functools.cached_property
    def row_indices(self) -> torch.Tensor:
        """int32 `[nnz]`: block row of each kept block, in row-major order."""
        return self.grid.nonzero()[:, 0].to(self.device, torch.int32)

    @functools.cached_property
    def col_indices(self) -> torch.Tensor:
        """int32 `[nnz]`: block column of each kept block, in row-major order."""
        return self.grid.nonzero()[:, 1].to(self.device, torch.int32)

    @functools.cached_property
    def nnz(self) -> int:
        """Number of kept blocks."""
        return int(self.grid.sum())

    @functools.cached_property
    def density(self) -> float:
        """Kept weights / dense weights; parts of blocks past the matrix do not count."""
        b = self.block_size
        heights = torch.full((self.grid.shape[0],), b, device="cpu")
        widths = torch.full((self.grid.shape[1],), b, device="cpu")
        heights[-1] = self.out_features - (len(heights) - 1) * b
        widths[-1] = self.in_features - (len(widths) - 1) * b
        kept = int((self.grid.long() * heights[:, None] * widths).sum())
        return kept / (self.out_features * self.in_features)

    @functools.cached_property
    def _key(self) -> tuple[int, int, int, bytes]:
        return (
            self.out_features,
            self.in_features,
            self.block_size,
            self.grid.numpy().tobytes(),
        )

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self._hash == other._hash and self._key == other._key

    def __repr__(self) -> str:
        rows, cols = self.grid.shape
        text = (
            f"BlockLayout({self.out_features}x{self.in_features}, block_size={self.block_size}, "
            f"grid {rows}x{cols}, nnz={self.nnz}, density {100 * self.density:.1f}%"
        )
        if self.density > self.nominal_density * 1.001:
            text += f"; the block cover grew it from {100 * self.nominal_density:.1f}%"
        return text + ")"

    def to_dense(self) -> torch.Tensor:
        """Returns the mask as bool `[out_features, in_features]`."""
        b = self.block_size
        mask = self.grid.repeat_interleave(b, 0).repeat_interleave(b, 1)
        return mask[: self.out_features, : self.in_features]

    def transpose(self) -> BlockLayout:
        """Returns the layout of the transposed matrix."""
        return BlockLayout.from_grid(
            self.grid.T,
            self.block_size,
            self.in_features,
            self.out_features,
            nominal_density=self.nominal_density,
        )

    def to(self, device: torch.device | str) -> BlockLayout:
        """Returns an equal layout with index tensors on `device`; the grid stays on the CPU."""
        return BlockLayout(
            self.out_features,
            self.in_features,
            self.block_size,
            self.grid,
            self.nominal_density,
            torch.device(device),
        )

    def _combine(self, other: object, grid: Any, same: _Fold, most: _Fold) -> BlockLayout:
        """`same` and `most` take nominal densities: of the operands that equal the result, or,
        where none does, of both."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        mine = (self.out_features, self.in_features, self.block_size)
        theirs = (other.out_features, other.in_features, other.block_size)
        if mine != theirs:
            raise ValueError(
                "layouts to combine must have one shape and block size, got "
                f"{mine[0]}x{mine[1]}/{mine[2]} and {theirs[0]}x{theirs[1]}/{theirs[2]}"
            )
        size = {"block_size": mine[2], "out_features": mine[0], "in_features": mine[1]}
        plain = BlockLayout.from_grid(grid(self.grid, other.grid), **size)
        asked = [x.nominal_density for x in (self, other)]
        equal = [x.nominal_density for x in (self, other) if x == plain]
        nominal = same(equal) if equal else min(plain.density, most(asked))
        return BlockLayout.from_grid(plain.grid, **size, nominal_density=nominal)

    def __or__(self, other: object) -> BlockLayout:
        return self._combine(other, torch.logical_or, max, sum)

    def __and__(self, other: object) -> BlockLayout:
        return self._combine(other, torch.logical_and, min, min)

    def plot(self, ax: Any = None) -> Any:
        """Draws the grid of kept blocks; returns the matplotlib axes.

        Args:
            ax: axes to draw into; default: new ones.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.imshow(self.grid.numpy(), cmap="Greys", interpolation="nearest", vmin=0, vmax=1)
        ax.set_xlabel(f"block column (of {self.block_size} inputs)")
        ax.set_ylabel(f"block row (of {self.block_size} outputs)")
        ax.set_title(f"{self.out_features}x{self.in_features}, density {100 * self.density:.1f}%")
        return ax
