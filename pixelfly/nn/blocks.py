"""Residual blocks of timm's ViT and Mixer with fewer passes over their activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops import add_layer_norm
from .dense import has_hooks, match_activation
from .mlp import PixelflyMLP
from .token_mlp import TokenMLP


def add_and_norm(
    norm: nn.Module, x: torch.Tensor, delta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `norm(x + delta)` and `x + delta`, in one pass where norm is a LayerNorm."""
    # Looked up there, what is missing costs no search and no message.
    attributes = vars(norm)
    if (
        _is_layer_norm(type(norm))
        and not attributes.get("_fast_norm", False)
        and norm.normalized_shape == x.shape[-1:]
        and not has_hooks(norm)
        and "forward" not in attributes
    ):
        weight, bias = norm.weight, norm.bias
        if weight is not None and bias is not None:
            return add_layer_norm(x, delta, weight, bias, norm.eps)
    x = x if delta is None else x + delta
    return norm(x), x


def add_mlp(x: torch.Tensor, mlp: nn.Module, y: torch.Tensor, *after: nn.Module) -> torch.Tensor:
    """Returns `x + after(mlp(y))`, the addition in the MLP's last kernel where that can be.

    Not in compiled code: inductor adds in the norm that follows, which reads the sum anyway.
    """
    if (
        type(mlp) is PixelflyMLP
        and x.dtype == y.dtype
        and not torch.compiler.is_compiling()
        and all(type(module) is nn.Identity for module in after)
        and not has_hooks(mlp)
    ):
        return mlp(y, x)
    y = mlp(y)
    for module in after:
        y = module(y)
    return x + y


def _is_layer_norm(kind: type[nn.Module]) -> bool:
    """Tells torch's and timm's LayerNorm; timm's without importing it."""
    return kind is nn.LayerNorm or (
        kind.__name__ == "LayerNorm" and kind.__module__ == "timm.layers.norm"
    )


class FusedBlock(nn.Module):
    """A block in the place of a library's, with that block's children under their names."""

    children_names: tuple[str, ...]

    @classmethod
    def from_module(cls, module: nn.Module) -> FusedBlock:
        """Takes a block's children over, as they are."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        for name in cls.children_names:
            block.add_module(name, module._modules[name])
        block._original = [module]  # in a list, which is not searched for parameters
        block.train(module.training)
        return block

    def to_original(self) -> nn.Module:
        """Gives the children back to the block that this one replaced, and returns it."""
        module = self._original[0]
        for name in self.children_names:
            module._modules[name] = self._modules[name]
        return module.train(self.training)


class FusedTransformerBlock(FusedBlock):
    """timm's `Block`: attention and MLP, each behind a LayerNorm and beside a residual path.

    The addition that ends the attention's path and the second norm are one pass, forward and
    backward; under autocast norms are written in its dtype, at once.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> block = FusedTransformerBlock.from_module(model.blocks[0])
        >>> block(torch.randn(2, 5, 192)).shape
        torch.Size([2, 5, 192])
    """

    children_names = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Applies the block to `[B, N, C]`; `options` are those of the attention."""
        part = self._modules  # looked up there, not by way of nn.Module.__getattr__
        y, x = add_and_norm(part["norm1"], x, None)
        y = part["drop_path1"](part["ls1"](part["attn"](y, **options)))
        y, x = add_and_norm(part["norm2"], x, y)
        return add_mlp(x, part["mlp"], y, part["ls2"], part["drop_path2"])


class FusedMixerBlock(FusedBlock):
    """timm's `MixerBlock`; its dense MLP over the tokens becomes a `TokenMLP`.

    Example:
        >>> import timm
        >>> model = timm.create_model("mixer_s32_224")
        >>> block = FusedMixerBlock.from_module(model.blocks[0])
        >>> block(torch.randn(2, 49, 512)).shape
        torch.Size([2, 49, 512])
    """

    children_names = ("norm1", "mlp_tokens", "drop_path", "norm2", "mlp_channels")

    @classmethod
    def from_module(cls, module: nn.Module) -> FusedBlock:
        """Takes a block's children over; its `mlp_tokens` must be timm's Mlp of dense layers."""
        block, mlp = super().from_module(module), module.mlp_tokens
        block.mlp_tokens = TokenMLP.from_layers(mlp.fc1, mlp.fc2, match_activation(mlp.act))
        return block

    def to_original(self) -> nn.Module:
        mlp, tokens = self._original[0].mlp_tokens, self.mlp_tokens
        mlp.fc1, mlp.fc2 = tokens.fc1, tokens.fc2
        self._modules["mlp_tokens"] = mlp
        return super().to_original()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the block to `[B, N, C]`."""
        # timm's patches come transposed, and the whole stream would stay so.
        part, drop_path = self._modules, self._modules["drop_path"]
        y, x = add_and_norm(part["norm1"], x.contiguous(), None)
        y, x = add_and_norm(part["norm2"], x, drop_path(part["mlp_tokens"](y)))
        return add_mlp(x, part["mlp_channels"], y, drop_path)
