"""The activations the operator fuses, and their numbers in the dispatcher schema."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The numbering is csrc/include/pixelfly/dtype.h's.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NONE, RELU, GELU, GELU_TANH, SILU = range(5)


def check_activation(prefix: str, activation: object) -> None:
    """Raises ValueError, its message after `prefix`, if there is no such activation."""
    known = activation is None or isinstance(activation, str) and activation in ACTIVATIONS
    if not known:
        raise ValueError(
            f"{prefix}activation must be one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"got {activation!r}"
        )


def apply_activation(z: torch.Tensor, activation: int) -> torch.Tensor:
    """Returns `act(z)` for an activation number."""
    if activation == NONE:
        return z
    if activation == RELU:
        return F.relu(z)
    if activation == GELU:
        return F.gelu(z)
    if activation == GELU_TANH:
        return F.gelu(z, approximate="tanh")
    return F.silu(z)


def activation_slope(z: torch.Tensor, activation: int) -> torch.Tensor:
    """Returns `act'(z)` for an activation number."""
    aten = torch.ops.aten
    ones = torch.ones_like(z)
    if activation == NONE:
        return ones
    if activation == RELU:
        return aten.threshold_backward(ones, z, 0)
    if activation == GELU:
        return aten.gelu_backward(ones, z)
    if activation == GELU_TANH:
        return aten.gelu_backward(ones, z, approximate="tanh")
    return aten.silu_backward(ones, z)
