"""Small models that several tests plan and count."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention and MLP under the names that libraries use."""

    def __init__(self, d: int = 256) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](self.mlp["fc1"](x).relu())
