"""`PixelflyMLP`: two Pixelfly layers with the activation fused into the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops import butterfly_mlp
from .linear import PixelflyLinear, is_plain


class PixelflyMLP(nn.Module):
    """Applies `fc2(act(fc1(x))) + residual`, a drop-in for timm's `Mlp` and GPT-2's MLP.

    Bias and activation happen in fc1's kernel, which keeps the activation's derivative for the
    backward, bias and residual in fc2's. In the backward fc2's kernel applies that derivative
    (unless a layer has hooks or a forward of its own, is a subclass or has a token gate). Two
    tensors of hidden width are kept for the backward, fc1's output and the derivative; with
    `recompute` neither is, and the backward runs the forward again.

    Args:
        in_features: K, a multiple of 8.
        hidden_features: width between the layers; None is `4 * in_features`.
        out_features: N; None is `in_features`.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        bias: whether the layers have biases.
        recompute: whether to keep the input alone for the backward (`torch.utils.checkpoint`).
        names: the layers' attribute names, which begin their keys in a state dict: ("fc1", "fc2")
            as in timm, ("c_fc", "c_proj") as in GPT-2.
        options: passed to both `PixelflyLinear`s: density, block_size, rank, device, dtype, ...

    Raises:
        TypeError: as `PixelflyLinear`.
        ValueError: as `PixelflyLinear`.

    Example:
        >>> import torch
        >>> mlp = PixelflyMLP(256, density=0.25, block_size=32)
        >>> x = torch.randn(2, 7, 256)
        >>> mlp(x, residual=x).shape
        torch.Size([2, 7, 256])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str | None = "gelu",
        bias: bool = True,
        recompute: bool = False,
        names: tuple[str, str] = ("fc1", "fc2"),
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        for name in ("layout", "activation"):
            if name in options:
                raise TypeError(f"PixelflyMLP: {name} cannot serve both layers; use from_layers")
        first = PixelflyLinear(in_features, hidden, bias, activation=activation, **options)
        second = PixelflyLinear(hidden, out, bias, **options)
        self._set_layers(first, second, names, recompute)

    @classmethod
    def from_layers(
        cls,
        first: PixelflyLinear,
        second: PixelflyLinear,
        names: tuple[str, str] = ("fc1", "fc2"),
        recompute: bool = False,
    ) -> PixelflyMLP:
        """Returns the MLP of two layers; the first one's activation is the MLP's.

        Example:
            >>> first = PixelflyLinear(64, 128, block_size=16, activation="silu")
            >>> mlp = PixelflyMLP.from_layers(first, PixelflyLinear(128, 64, block_size=16))
            >>> [name for name, _ in mlp.named_children()]
            ['fc1', 'fc2']
        """
        if first.out_features != second.in_features:
            raise ValueError(
                f"PixelflyMLP: second.in_features must be first.out_features={first.out_features}, "
                f"got {second.in_features}"
            )
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._set_layers(first, second, names, recompute)
        return mlp

    def _set_layers(
        self,
        first: PixelflyLinear,
        second: PixelflyLinear,
        names: tuple[str, str],
        recompute: bool,
    ) -> None:
        if len(names) != 2 or names[0] == names[1]:
            raise ValueError(f"PixelflyMLP: names must be two different names, got {names!r}")
        self.names, self.recompute = tuple(names), recompute
        self.add_module(names[0], first)
        self.add_module(names[1], second)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Applies the MLP.

        Args:
            x: `[..., K]`.
            residual: `[..., N]`, added to the output, or None.

        Returns:
            `[..., N]`.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._apply_layers, x, residual, use_reentrant=False, preserve_rng_state=False
            )
        return self._apply_layers(x, residual)

    def _apply_layers(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        first, second = self.names
        first, second = self._modules[first], self._modules[second]
        if is_plain(first) and is_plain(second) and second.activation is None:
            weights = (first._weights(), second._weights())
            return butterfly_mlp(x, *weights, activation=first.activation, residual=residual)
        return second(first(x), residual)
