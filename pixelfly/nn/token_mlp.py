"""`TokenMLP`: the dense MLP over the tokens of an MLP-Mixer, without transposing copies."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.activations import ACTIVATIONS, check_activation
from ..ops.token_mlp import token_layout, token_mlp


class TokenMLP(nn.Module):
    """Applies `fc2(act(fc1(x)))` over the tokens of `[B, N, C]`, for every channel by itself.

    What timm's Mixer writes as `mlp(x.transpose(1, 2)).transpose(1, 2)`. Here the weights multiply
    each sample from the left, as it lies in memory, so neither the forward nor the backward
    transposes activations. The weights are dense. On Hopper in 16 bits, with C a multiple of 16,
    biases and activation are parts of the products' kernels.

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
        sizes = ((layer.out_features, layer.in_features) for layer in (fc1, fc2))
        self._layouts = tuple(token_layout(*size) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the MLP.

        Args:
            x: `[B, N, C]`.

        Returns:
            `[B, N, C]`, under autocast in its dtype.
        """
        fc1, fc2 = self._modules["fc1"], self._modules["fc2"]
        weight = fc1.weight
        if x.dim() != 3 or x.shape[1] != fc1.in_features:
            raise ValueError(f"TokenMLP: x must be [B, {fc1.in_features}, C], got {list(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != weight.dtype:
            raise TypeError(
                f"TokenMLP: x must have the weights' dtype {weight.dtype}, got {x.dtype}"
            )
        layers = (weight, fc1.bias, fc2.weight, fc2.bias)
        return token_mlp(x, *layers, ACTIVATIONS[self.activation], self._layouts)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
