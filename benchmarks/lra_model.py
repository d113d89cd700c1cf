"""The Long Range Arena's transformers: sizes, and the kinds of attention that are compared."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelfly.nn import AttentionConfig, PixelflyLinear, PixelflySelfAttention


@dataclasses.dataclass(frozen=True)
class Size:
    """One task's standard model."""

    length: int
    width: int
    heads: int
    layers: int
    hidden: int
    vocabulary: int
    classes: int
    batch: int
    linear_block: int | None  # b of the sparse linear layers; None: too narrow to gain, all dense
    padded: bool = False  # token 0 is padding, which nobody attends to
    picture: bool = False  # tokens are the pixels of a square, in z_order


SIZES = {
    "listops": Size(2000, 512, 8, 4, 1024, 16, 10, 32, 64, padded=True),
    "text": Size(1000, 256, 4, 4, 1024, 256, 2, 32, 32, padded=True),
    "retrieval": Size(4000, 64, 2, 2, 128, 256, 2, 32, None, padded=True),  # one of the two towers
    "image": Size(1024, 128, 8, 1, 128, 256, 10, 256, None, picture=True),
    "pathfinder": Size(1024, 64, 2, 2, 128, 256, 2, 512, None, picture=True),
    "toy": Size(96, 32, 2, 1, 64, 16, 10, 4, 16, padded=True),
}
KINDS = ("scores", "sdpa", "sdpa_cudnn", "pixelfly")


class DenseAttention(nn.Module):
    """All scores: formed in memory ("scores"), or by torch's fused kernels: those that torch
    chooses ("sdpa"), or cuDNN's ("sdpa_cudnn")."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        elif self.kind == "sdpa_cudnn":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            if attn_mask is not None:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            y = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, then an MLP of two layers; dropout of what each adds."""

    def __init__(self, size: Size, attention: nn.Module, linear, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = attention
        self.fc1 = linear(size.width, size.hidden, True)
        self.fc2 = linear(size.hidden, size.width, True)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def square_side(length: int) -> int:
    side = math.isqrt(length)
    if side**2 != length:
        raise ValueError(f"expected a square number of pixels, got {length}")
    return side


def z_order(length: int) -> torch.Tensor:
    """The pixels of a square picture, numbered row by row, in Morton's order: 64 in succession are
    a square of 8 x 8, so that a block of scores belongs to two squares, where row by row it would
    to two bands across the picture. To dense attention all orders are one. `[length]`, int64."""
    side = square_side(length)
    line = torch.arange(side)
    spread = sum((line >> bit & 1) << 2 * bit for bit in range(side.bit_length()))
    return (2 * spread[:, None] + spread).flatten().argsort()


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Places of a square picture's pixels, `[length, width]`, of mean square 1: half of the
    features tell the row, half the column, as sines and cosines; periods begin at 2 pi pixels and
    stay below 200 pi."""
    side = square_side(length)
    if width % 4:
        raise ValueError(f"expected a width in fours, got {width}")
    periods = 100.0 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] / periods
    line = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)


class Encoder(nn.Module):
    """Embeddings, blocks, the mean over the tokens and a classifier; token ids to logits.

    Places are learned. A picture's begin as sinusoids, as large as the embeddings of tokens: with
    small ones Pathfinder was not learned.
    """

    def __init__(self, size: Size, blocks: list[nn.Module], dropout: float) -> None:
        super().__init__()
        self.padded = size.padded
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        places = torch.randn(size.length, size.width) * 0.02
        if size.picture:
            places = sinusoids(size.length, size.width)[z_order(size.length)]
        self.places = nn.Parameter(places)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.tokens(ids) + self.places[: ids.shape[1]])
        seen = ids != 0 if self.padded else None
        mask = None if seen is None else seen[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if seen is None:
            return self.head(x.mean(1))
        weight = seen.to(x.dtype).unsqueeze(-1)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))


def build(
    kind: str, size: Size, density: float, attention_block: int, dropout: float = 0.0
) -> Encoder:
    """A model of one kind: one of `DenseAttention`'s; or "pixelfly", with sparse attention and,
    where the model is wide enough, linear layers of butterfly + global blocks. Dropout is of the
    embeddings and of what attention and MLPs add, not of attention's weights.

    Raises:
        ValueError: no layer of this density and block size exists; the message names the nearest.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    linear = nn.Linear
    if kind == "pixelfly" and size.linear_block is not None:
        linear = functools.partial(
            PixelflyLinear, density=density, block_size=size.linear_block, lowrank="global"
        )
    config = AttentionConfig(attention_block)

    def attention() -> nn.Module:
        if kind == "pixelfly":
            return PixelflySelfAttention(size.width, size.heads, attention=config, linear=linear)
        return DenseAttention(size.width, size.heads, kind)

    blocks = [Block(size, attention(), linear, dropout) for _ in range(size.layers)]
    return Encoder(size, blocks, dropout)
