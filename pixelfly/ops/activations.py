"""The activations the operator fuses, their numbers in the dispatcher schema, and how slopes (their
derivatives) are kept for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The numbering is csrc/include/pixelfly/dtype.h's.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NONE, RELU, GELU, GELU_TANH, SILU = range(5)


def known_activation(activation: object) -> bool:
    """Whether there is such an activation."""
    return activation is None or (isinstance(activation, str) and activation in ACTIVATIONS)


def check_activation(prefix: str, activation: object) -> None:
    """Raises ValueError, its message after `prefix`, if there is no such activation."""
    if not known_activation(activation):
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


# bfloat16 keeps slopes in 8 bits, as csrc/device/slope_code.cuh has it: code q stands for
# (q - 26) / 200, which holds 0 and 1 exactly and reaches from -0.13 to 1.13; 255 is NaN. bfloat16
# itself has steps of 1/256 and 1/128 on either side of 1. The other dtypes have finer ones, which
# codes would lose: they keep slopes as they are.
CODE_OF_ZERO, CODE_OF_NAN, CODES_PER_ONE = 26, 255, 200


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what slopes of tensors of `dtype` are kept in."""
    return torch.uint8 if dtype == torch.bfloat16 else dtype


def empty_slope(x: torch.Tensor, features: int) -> torch.Tensor:
    """Returns an uninitialised `[T, features]` for the slopes of a layer with input `x [T, K]`.

    Rows of codes are padded to 16 bytes so that kernels can read them as vectors.
    """
    dtype = slope_dtype(x.dtype)
    if dtype != torch.uint8:
        return x.new_empty(x.shape[0], features)
    padded = -(-features // 16) * 16
    slope = x.new_empty(x.shape[0], padded, dtype=dtype)
    return slope if padded == features else slope[:, :features]


def encode_slope(slope: torch.Tensor) -> torch.Tensor:
    """Returns the codes of slopes as whole numbers in slope's dtype, float32 or wider."""
    nan = (CODE_OF_NAN - CODE_OF_ZERO) / CODES_PER_ONE
    codes = (slope.nan_to_num(nan=nan) * CODES_PER_ONE).round_() + CODE_OF_ZERO
    return codes.clamp_(0, CODE_OF_NAN)


def decode_slope(slope: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns saved slopes, codes or not, as numbers in `dtype`."""
    if slope.dtype != torch.uint8:
        return slope.to(dtype)
    values = (slope.to(dtype) - CODE_OF_ZERO) / CODES_PER_ONE
    return values.masked_fill_(slope == CODE_OF_NAN, torch.nan)
