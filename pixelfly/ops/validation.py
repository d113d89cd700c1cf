"""Argument checks of the operator: each names the argument, what was expected and what came."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..masks import BlockLayout
from .activations import check_activation

BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OP = "butterfly_lowrank_mm"


class Call(NamedTuple):
    """What a call with one layout, rank, dtype and device needs, and the sizes it comes with."""

    plan: torch.Tensor
    header: str
    rank: int
    out_features: int
    in_features: int
    block_size: int
    nnz: int


def known_call(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    bias: torch.Tensor | None,
    rounds: bool,
) -> Call | None:
    """Returns the `Call` of weights that all checks below would let pass, or None.

    One look-up among `layout.calls`, the calls that were checked, and no messages: whatever it is
    not sure of, the checks explain. Of x this takes dtype and device alone: see `known_ends`.
    """
    if not (
        type(layout) is BlockLayout
        and isinstance(x, torch.Tensor)
        and isinstance(blocks, torch.Tensor)
    ):
        return None
    rank, dtype, device, weights = 0, x.dtype, x.device, blocks.dtype
    if u is not None or v is not None:
        if not (isinstance(u, torch.Tensor) and isinstance(v, torch.Tensor) and u.dim() == 2):
            return None
        rank = u.shape[1]
        if rank == 0:
            return None
    call = layout.calls.get((rank, dtype, device))
    if call is None or not (weights == dtype or (rounds and weights == torch.float32)):
        return None
    _, _, _, n, k, b, nnz = call
    fits = (
        blocks.shape == (nnz, b, b)
        and blocks.device == device
        and (
            u is None
            or u.shape == (n, rank)
            and v.shape == (rank, k)
            and u.dtype == weights == v.dtype
            and u.device == device == v.device
        )
        and (
            bias is None
            or isinstance(bias, torch.Tensor)
            and bias.shape == (n,)
            and bias.dtype == weights
            and bias.device == device
        )
    )
    return call if fits else None


def known_ends(
    x: torch.Tensor, in_features: int, residual: torch.Tensor | None, out_features: int
) -> bool:
    """Whether the checks below would let x and the residual pass beside known weights."""
    shape = x.shape
    return shape[-1:] == (in_features,) and (
        residual is None
        or isinstance(residual, torch.Tensor)
        and residual.shape == (*shape[:-1], out_features)
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def check_types(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    optional: dict[str, torch.Tensor | None],
    activation: str | None,
) -> None:
    """Checks what does not depend on shapes; raises TypeError or ValueError."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{OP}: layout must be a BlockLayout, got {type(layout).__name__}")
    for name, tensor in (("x", x), ("blocks", blocks)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a Tensor, got {type(tensor).__name__}")
    for name, tensor in optional.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a Tensor or None, got {type(tensor).__name__}")
    if (optional["u"] is None) != (optional["v"] is None):
        given, missing = ("u", "v") if optional["v"] is None else ("v", "u")
        raise ValueError(f"{OP}: u and v must be given together, got {given} without {missing}")
    check_activation(f"{OP}: ", activation)


def check_dtypes_and_devices(
    x: torch.Tensor,
    blocks: torch.Tensor,
    optional: dict[str, torch.Tensor | None],
    rounds: bool = False,
) -> None:
    """Checks that everything shares x's device and x's dtype; where it `rounds`, or is float32."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{OP}: x.dtype must be bfloat16, float16, float32 or float64, got {x.dtype}"
        )
    if x.dtype == torch.float64 and x.is_cuda:
        raise TypeError(
            f"{OP}: float64 runs on the CPU only; on {x.device} x.dtype must be bfloat16, "
            "float16 or float32"
        )
    for name, tensor in (("blocks", blocks), *optional.items()):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype and not (rounds and tensor.dtype == torch.float32):
            raise TypeError(
                f"{OP}: {name}.dtype must be x.dtype={x.dtype} (outside autocast), "
                f"got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{OP}: {name}.device must be x.device={x.device}, got {tensor.device}"
            )


def check_shapes(
    x: torch.Tensor,
    blocks: torch.Tensor,
    sizes: tuple[int, int, int, int],
    optional: dict[str, torch.Tensor | None],
) -> None:
    """Checks every shape against the layout's `(out_features, in_features, block_size, nnz)`."""
    n, k, b, nnz = sizes
    if b not in BLOCK_SIZES:
        raise ValueError(f"{OP}: layout.block_size must be one of {BLOCK_SIZES}, got {b}")
    if n % 8 or k % 8:
        raise ValueError(
            f"{OP}: layout.out_features and in_features must be multiples of 8, got {n} and {k}"
        )
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have shape [..., in_features={k}], got a 0-d tensor")
    if x.shape[-1] != k:
        raise ValueError(f"{OP}: x.shape[-1] must be in_features={k}, got {x.shape[-1]}")
    if blocks.dim() != 3 or blocks.shape[1] != b or blocks.shape[2] != b or blocks.shape[0] != nnz:
        raise ValueError(
            f"{OP}: blocks.shape must be [nnz, b, b] = {[nnz, b, b]} for this layout, "
            f"got {list(blocks.shape)}"
        )
    u, v = optional["u"], optional["v"]
    if u is not None and v is not None:
        if u.dim() != 2 or u.shape[0] != n:
            raise ValueError(f"{OP}: u.shape must be [out_features={n}, rank], got {list(u.shape)}")
        rank = u.shape[1]
        if v.dim() != 2 or v.shape[0] != rank or v.shape[1] != k:
            raise ValueError(
                f"{OP}: v.shape must be [rank={rank}, in_features={k}] (rank is u.shape[1]), "
                f"got {list(v.shape)}"
            )
    bias, residual = optional["bias"], optional["residual"]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(f"{OP}: bias.shape must be [out_features={n}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(
            f"{OP}: residual.shape must be y's shape {[*x.shape[:-1], n]}, "
            f"got {list(residual.shape)}"
        )
