"""Structures that pixelfly is compared with and that are no layouts: products and moving masks.

`MonarchLinear` is a product of two block-diagonal matrices with a shuffle between them.
`RiglLinear` is a dense weight under a mask of blocks that moves during training; it runs dense
matmuls, as its authors' code does, so its step times are dense ones and only its losses compare.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from pixelfly.nn.project import kept_mask
from pixelfly.patterns import pattern_structure


class MonarchLinear(nn.Module):
    """`y = B · shuffle(A · x)` with block-diagonal A and B.

    Input is cut into m groups of K/m features and output into s groups of N/s. Every input group
    sends r numbers to every output group: `first [m, s·r, K/m]`, `second [s, N/s, m·r]`.

    Source: Dao et al., "Monarch" (ICML 2022), in the ranked form of Qiu et al., "Compute Better
    Spent" (ICML 2024), BTT; initial scales from there: each factor keeps the variance.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, density: float, std: float
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.groups_in, self.groups_out, self.rank = monarch_sizes(
            out_features, in_features, density
        )
        m, s, r = self.groups_in, self.groups_out, self.rank
        k, n = in_features // m, out_features // s
        self.first = nn.Parameter(torch.randn(m, s * r, k) / math.sqrt(k))
        out_std = std * math.sqrt(in_features / (m * r))
        self.second = nn.Parameter(torch.randn(s, n, m * r) * out_std)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def density(self) -> float:
        """Weights of the layer / weights of a dense layer."""
        kept = self.first.numel() + self.second.numel()
        return kept / (self.in_features * self.out_features)

    def lr_scales(self) -> dict[str, float]:
        """Factors of the learning rate: `K / inputs`, shared by the two factors."""
        k = self.in_features
        return {
            "first": k / self.first.shape[2] / 2,
            "second": k / self.second.shape[2] / 2,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m, s, r = self.groups_in, self.groups_out, self.rank
        rows = x.reshape(-1, m, self.in_features // m).transpose(0, 1)  # [m, T, K/m]
        t = torch.bmm(rows, self.first.transpose(1, 2).to(rows.dtype))  # [m, T, s·r]
        t = t.reshape(m, -1, s, r).permute(2, 1, 0, 3).reshape(s, -1, m * r)
        y = torch.bmm(t, self.second.transpose(1, 2).to(t.dtype))  # [s, T, N/s]
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def monarch_sizes(n: int, k: int, density: float) -> tuple[int, int, int]:
    """Returns (m, s, r): the most weights not above the density, groups nearest to the roots."""
    budget, best = density * n * k, None
    for m in _divisors_near_root(k):
        for s in _divisors_near_root(n):
            each = s * k + n * m  # weights of one rank
            rank = min(int(budget / each), k // m, n // s)
            if rank:
                far = abs(math.log(m * m / k)) + abs(math.log(s * s / n))
                score = (round(rank * each / budget, 2), -far)
                if best is None or score > best[0]:
                    best = (score, (m, s, rank))
    if best is None:
        raise ValueError(f"monarch: density={density:g} is not reachable for {k} -> {n}")
    return best[1]


def _divisors_near_root(size: int) -> list[int]:
    root = math.sqrt(size)
    return [d for d in range(2, size // 2) if size % d == 0 and root / 2 <= d <= 2 * root]


class _Masked(torch.autograd.Function):
    """`weight * mask`; the backward pass leaves each block's gradient norm in `scores`."""

    @staticmethod
    def forward(ctx, weight, mask, scores, b):
        ctx.save_for_backward(mask, scores)
        ctx.b = b
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        mask, scores = ctx.saved_tensors
        scores.copy_(_block_norms(grad, ctx.b))
        return grad * mask, None, None, None


def _block_norms(matrix: torch.Tensor, b: int) -> torch.Tensor:
    n, k = matrix.shape
    padded = F.pad(matrix.float(), (0, -k % b, 0, -n % b))
    rows, cols = padded.shape[0] // b, padded.shape[1] // b
    return padded.reshape(rows, b, cols, b).square().sum((1, 3))


class RiglLinear(nn.Module):
    """A linear layer whose kept blocks move: the smallest go, those of the largest gradient come.

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), with blocks for its single weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        density: float,
        std: float,
        block_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        layout, _ = pattern_structure(
            "random", out_features, in_features, density=density, block_size=block_size, seed=seed
        )
        self.block_size = block_size
        mask = kept_mask(layout).float()
        self.density = mask.mean().item()
        weight = torch.randn(out_features, in_features) * std / math.sqrt(self.density)
        self.weight = nn.Parameter(weight * mask)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("mask", mask)
        self.register_buffer("scores", torch.zeros(layout.grid.shape))

    def lr_scales(self) -> dict[str, float]:
        """The rule of `pixelfly.param_groups` for blocks: `K / kept inputs`."""
        return {"weight": 1 / self.density}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(
            x, _Masked.apply(self.weight, self.mask, self.scores, self.block_size), self.bias
        )

    @torch.no_grad()
    def move(self, fraction: float, moments: list[torch.Tensor]) -> int:
        """Moves a fraction of the blocks; new ones start at zero weight, as do their moments.

        Returns how many blocks moved. The mask changes in place, so CUDA graphs see it.
        """
        b, (rows, cols) = self.block_size, self.scores.shape
        kept = self.mask[::b, ::b].flatten() > 0
        count = min(int(fraction * int(kept.sum())), int((~kept).sum()))
        if count == 0:
            return 0
        sizes = _block_norms(self.weight, b).flatten()
        gone = sizes.masked_fill(~kept, math.inf).topk(count, largest=False).indices
        come = self.scores.flatten().masked_fill(kept, -math.inf).topk(count).indices
        kept[gone] = False
        kept[come] = True
        fresh = torch.zeros_like(kept)
        fresh[come] = True
        grid = kept.reshape(rows, cols)
        self.mask.copy_(self._spread(grid))
        clear = self.mask * (1 - self._spread(fresh.reshape(rows, cols)))
        for tensor in (self.weight, *moments):
            tensor.mul_(clear)
        return count

    def _spread(self, grid: torch.Tensor) -> torch.Tensor:
        b = self.block_size
        wide = grid.float().repeat_interleave(b, 0).repeat_interleave(b, 1)
        return wide[: self.out_features, : self.in_features]
