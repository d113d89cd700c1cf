"""`TokenMLP`: the dense MLP over the tokens of an MLP-Mixer, without transposing copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..ops.activations import ACTIVATIONS, apply_activation, check_activation


class TokenMLP(nn.Module):
    """Applies `fc2(act(fc1(x)))` over the tokens of `[B, N, C]`, for every channel by itself.

    What timm's Mixer writes as `mlp(x.transpose(1, 2)).transpose(1, 2)`. Here the weights multiply
    each sample from the left, as batched matrix products over x as it lies in memory, so neither
    the forward nor the backward transposes activations. The weights are dense.

    Args:
        tokens: N.
        hidden_features: width between the layers.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        bias: whether the layers have biases.
        device, dtype: of the parameters.

    Raises:
        ValueError: there is no such activation.

    Source: MLP-Mixer (Tolstikhin et al., NeurIPS 2021), section 2.

    Example:
        >>> import torch
        >>> TokenMLP(196, 384)(torch.randn(2, 196, 64)).shape
        torch.Size([2, 196, 64])
    """

    def __init__(
        self,
        tokens: int,
        hidden_features: int,
        *,
        activation: str | None = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self._set_layers(
            nn.Linear(tokens, hidden_features, **options),
            nn.Linear(hidden_features, tokens, **options),
            activation,
        )

    @classmethod
    def from_layers(cls, fc1: nn.Linear, fc2: nn.Linear, activation: str | None) -> TokenMLP:
        """Returns the MLP of two dense layers, which it holds as they are.

        Example:
            >>> mlp = TokenMLP.from_layers(nn.Linear(16, 32), nn.Linear(32, 16), "relu")
            >>> mlp.extra_repr()
            "activation='relu'"
        """
        if fc1.out_features != fc2.in_features or fc1.in_features != fc2.out_features:
            raise ValueError(
                "TokenMLP: the layers must lead from N tokens to a hidden width and back, got "
                f"{fc1.in_features} to {fc1.out_features} and "
                f"{fc2.in_features} to {fc2.out_features}"
            )
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._set_layers(fc1, fc2, activation)
        return mlp

    def _set_layers(self, fc1: nn.Linear, fc2: nn.Linear, activation: str | None) -> None:
        check_activation("TokenMLP: ", activation)
        self.fc1, self.fc2, self.activation = fc1, fc2, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the MLP.

        Args:
            x: `[B, N, C]`.

        Returns:
            `[B, N, C]`, under autocast in its dtype.
        """
        if x.dim() != 3 or x.shape[1] != self.fc1.in_features:
            raise ValueError(
                f"TokenMLP: x must be [B, {self.fc1.in_features}, C], got {list(x.shape)}"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != self.fc1.weight.dtype:
            raise TypeError(
                f"TokenMLP: x must have the weights' dtype {self.fc1.weight.dtype}, got {x.dtype}"
            )
        with torch.autocast(x.device.type, enabled=False):
            layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return _TokenMLP.apply(x, *layers, ACTIVATIONS[self.activation])

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _aligned(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of `like`, rows a multiple of 16 bytes apart.

    The 196 tokens of a Mixer are not, and cuBLAS then takes kernels of older GPUs.
    """
    n, k = weight.shape
    multiple = 16 // like.element_size()
    if k % multiple == 0:
        return weight.to(like.dtype)
    return like.new_empty(n, -(-k // multiple) * multiple)[:, :k].copy_(weight)


def _apply(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`weight · x + bias` for every sample; weight `[N, K]`, x `[B, K, C]`, bias `[N]`."""
    y = torch.bmm(weight.expand(x.shape[0], -1, -1), x)
    return y if bias is None else y.add_(bias[:, None])


def _weight_grad(dy: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of `_apply`'s weight: a product for every sample, summed in float32."""
    wide = torch.promote_types(torch.float32, like.dtype)
    return torch.bmm(dy, x.mT).sum(0, dtype=wide).to(like.dtype)


def _bias_grad(dy: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return dy.sum((0, 2), dtype=torch.promote_types(torch.float32, like.dtype)).to(like.dtype)


def _activation_grad(dy: torch.Tensor, z: torch.Tensor, activation: int) -> torch.Tensor:
    aten = torch.ops.aten
    return {
        0: lambda: dy,
        1: lambda: aten.threshold_backward(dy, z, 0),
        2: lambda: aten.gelu_backward(dy, z),
        3: lambda: aten.gelu_backward(dy, z, approximate="tanh"),
        4: lambda: aten.silu_backward(dy, z),
    }[activation]()


class _TokenMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, activation: int) -> torch.Tensor:
        first, second = _aligned(w1, x), _aligned(w2, x)
        z = _apply(first, x, b1)
        hidden = apply_activation(z, activation)
        ctx.activation = activation
        ctx.save_for_backward(x, z, hidden, first, second, w1, b1, w2, b2)
        return _apply(second, hidden, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, hidden, first, second, w1, b1, w2, b2 = ctx.saved_tensors
        need_dx, need_dw1, need_db1, need_dw2, need_db2 = ctx.needs_input_grad[:5]
        dx = dw1 = db1 = dw2 = db2 = None
        if need_dw2:
            dw2 = _weight_grad(dy, hidden, w2)
        if need_db2:
            db2 = _bias_grad(dy, b2)
        if need_dx or need_dw1 or need_db1:
            dz = _activation_grad(_apply(second.mT, dy, None), z, ctx.activation)
            if need_dw1:
                dw1 = _weight_grad(dz, x, w1)
            if need_db1:
                db1 = _bias_grad(dz, b1)
            if need_dx:
                dx = _apply(first.mT, dz, None)
        return dx, dw1, db1, dw2, db2, None
