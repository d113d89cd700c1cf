"""What training on several processes needs beyond torch's own engines.

DDP, FSDP2 (`fully_shard`) and `torch.distributed.checkpoint` take Pixelfly layers as they take
dense ones: parameters are plain, index buffers are replicated and not saved, layouts travel in the
state dict as extra state.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from .nn.linear import PixelflyLinear
from .nn.state import describe


def check_same_layouts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank unless all ranks' Pixelfly layers have the same layouts.

    Wrappers compare shapes at most: blocks of another layout may have the same shape, and their
    gradients would be averaged in silence. Call it once, before wrapping the model. A collective:
    every rank of the group must call it.

    Args:
        model: the model, not wrapped yet.
        group: the process group; None is the default one.

    Raises:
        ValueError: the layers or their layouts differ between ranks; the message names the first
            layer that does.
        RuntimeError: the process group is not initialised.

    Example:
        >>> import torch.distributed as dist
        >>> from torch import nn
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> check_same_layouts(nn.Sequential(PixelflyLinear(64, 64, block_size=16)))
        >>> dist.destroy_process_group()
    """
    if not dist.is_initialized():
        raise RuntimeError("check_same_layouts: call torch.distributed.init_process_group first")
    mine = [
        (name, f"{describe(layer.layout)}, rank {layer.rank}", _digest(layer))
        for name, layer in model.named_modules()
        if isinstance(layer, PixelflyLinear)
    ]
    everyone: list[list[tuple[str, str, str]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        for i in range(max(len(other), len(everyone[0]))):
            here = everyone[0][i] if i < len(everyone[0]) else ("no layer", "", "")
            there = other[i] if i < len(other) else ("no layer", "", "")
            if here != there:
                raise ValueError(
                    "check_same_layouts: all ranks must have the same layers and layouts; rank 0 "
                    f"has {here[0]} ({here[1]}), rank {rank} has {there[0]} ({there[1]}); build "
                    "the model from the same seed and config on every rank"
                )


def _digest(layer: PixelflyLinear) -> str:
    grid = torch.as_tensor(layer.layout.grid).to("cpu", torch.uint8)
    return hashlib.sha256(grid.numpy().tobytes()).hexdigest()
