"""`butterfly_lowrank_mm`: the one entry point of the operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..masks import BlockLayout
from . import validation
from .activations import ACTIVATIONS, NONE, RELU, known_activation
from .autograd import as_rows, needs_grad, run_linear, unflatten_rows
from .plan import device_plan, layout_sizes, plan_header
from .tracing import traced_constant


@traced_constant
def matmul_allows_tf32() -> bool:
    # Dynamo's global guard watches this setting, so a constant is safe in a traced program.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Returns the dtype autocast asks for, or None outside autocast and for float64."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    # As torch's own autocast does, leave float64 and integers alone.
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def products_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype that products of x run in: autocast's inside an autocast region."""
    return _autocast_dtype(x) or x.dtype


def autocast_input(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
    """Returns x in autocast's dtype, and that dtype; x as it is and None where there is none."""
    dtype = _autocast_dtype(x) if isinstance(x, torch.Tensor) else None
    return (x if dtype is None or x.dtype == dtype else x.to(dtype)), dtype


def allows_tf32(x: torch.Tensor) -> bool:
    """Whether products of x may use TF32."""
    return x.dtype == torch.float32 and x.is_cuda and matmul_allows_tf32()


def _constant_int(size: int) -> int:
    """Returns a size as a plain integer, which tracing may have made symbolic."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return guard_scalar(size)
    return size


def butterfly_lowrank_mm(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies a linear layer whose weight is `block butterfly + low rank`.

    Computes `act(x · Bᵀ + (x · vᵀ) · uᵀ + bias) + residual`, where B is the `[N, K]` matrix whose
    kept blocks are `blocks`. Differentiable once with respect to every tensor; works under
    `torch.compile`, autocast and CUDA graphs (after one warm-up call).

    Args:
        x: `[..., K]` bfloat16, float16, float32 (TF32 follows torch's matmul precision setting)
            or, on the CPU, float64.
        blocks: `[nnz, b, b]`, row-major over the layout, out x in inside a block. What lies past
            `N` or `K` in the blocks of the last row or column must be finite and has no effect.
        layout: which blocks are kept; the same object or an equal one at every call.
        u: `[N, r]` low-rank factor, or None. Comes together with `v`; `r` may be 0.
        v: `[r, K]` low-rank factor, or None.
        bias: `[N]` or None.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: `[..., N]`, added after the activation, or None.

    Returns:
        `[..., N]` in x's dtype (autocast's inside an autocast region).

    Raises:
        TypeError: an argument's type or dtype is wrong, or the dtypes differ outside autocast.
        ValueError: a shape, a device or the activation is wrong.
        RuntimeError: this build or this device has no kernel for the call.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3: `W = γB + (1−γ)UVᵀ` with the
        scalars left to the caller.

    Example:
        >>> import torch
        >>> from pixelfly.masks import flat_block_butterfly
        >>> layout = flat_block_butterfly(256, 256, block_size=32)
        >>> blocks = torch.randn(layout.nnz, 32, 32) / 16
        >>> u, v = torch.randn(256, 8) / 16, torch.randn(8, 256) / 16
        >>> butterfly_lowrank_mm(torch.randn(2, 5, 256), blocks, layout, u, v).shape
        torch.Size([2, 5, 256])
    """
    return linear(x, blocks, layout, u, v, bias, activation, residual)[0]


def linear(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    *,
    give_slope: bool = False,
    x_slope: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`butterfly_lowrank_mm`, and for two layers that share an activation its derivative.

    With give_slope, which takes no residual, the second result is the activation's derivative as
    `[T, N]` rows, unless nothing is differentiated. Whoever uses y then must pass on y's gradient
    times that: a layer that is given it as x_slope `[T, K]` does so to its x.
    """
    x, dtype = autocast_input(x)
    compiling = torch.compiler.is_compiling()
    call = None
    if not compiling:
        call = validation.known_call(x, blocks, layout, u, v, bias, dtype is not None)
    if (
        call is None
        or not validation.known_ends(x, call.in_features, residual, call.out_features)
        or not known_activation(activation)
    ):
        blocks, u, v, bias, residual, call = check_call(
            x, blocks, layout, u, v, bias, residual, activation, dtype
        )
    kind = ACTIVATIONS[activation]
    differentiated = needs_grad(x, blocks, u, v, bias)
    save_slope = differentiated and (give_slope or _derivative_needs_slope(kind, residual))
    options = (call.plan, call.header, kind, save_slope, allows_tf32(x), x_slope, give_slope)
    if not compiling:
        return run_linear(
            x, blocks, u, v, bias, residual, *options,
            needs_grad=differentiated or needs_grad(residual),
        )  # fmt: skip
    weights = (None if w is None else w.contiguous() for w in (blocks, u, v, bias))
    residual = None if residual is None else as_rows(residual)
    y, slope = torch.ops.pixelfly.linear(as_rows(x), *weights, residual, *options)
    return unflatten_rows(y, x.shape), slope


def check_call(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    autocast: torch.dtype | None,
) -> tuple[Any, ...]:
    """Checks the arguments of `linear`, whose x is in autocast's dtype already.

    Returns blocks, u, v, bias and residual as `pixelfly::linear` takes them, and their `Call`.
    """
    optional = {"u": u, "v": v, "bias": bias, "residual": residual}
    validation.check_types(x, blocks, layout, optional, activation)
    if autocast is not None:
        weights = [t for t in (blocks, u, v, bias) if t is not None]
        # Float32 weights are rounded by the operator, whose gradients of them then are not.
        keep = all(t.dtype == torch.float32 for t in weights)
        blocks = blocks if keep else blocks.to(autocast)
        optional = {
            k: t if t is None or (keep and k != "residual") else t.to(autocast)
            for k, t in optional.items()
        }
    validation.check_dtypes_and_devices(x, blocks, optional, rounds=autocast is not None)
    sizes = layout_sizes(layout)
    validation.check_shapes(x, blocks, sizes, optional)
    u, v, bias, residual = optional.values()

    rank = 0 if u is None else _constant_int(u.shape[1])
    if rank == 0 or u is None or v is None:
        u = v = None
    elif rank % 8 and x.is_cuda:
        # The kernels read rows of u in 16-byte pieces; columns of zeros change nothing.
        pad = -rank % 8
        u, v = F.pad(u, (0, pad)), F.pad(v, (0, 0, 0, pad))
        rank += pad
    call = validation.Call(
        device_plan(layout, rank, x.device), plan_header(layout, rank, x.device), rank, *sizes
    )
    if not torch.compiler.is_compiling():
        layout.calls[rank, x.dtype, x.device] = call
    return blocks, u, v, bias, residual, call


def check_arguments(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    optional: dict[str, torch.Tensor | None],
    activation: str | None = None,
) -> None:
    """Raises what `linear` raises on these arguments; for callers that compute something first."""
    validation.check_types(x, blocks, layout, optional, activation)
    if _autocast_dtype(x) is None:
        validation.check_dtypes_and_devices(x, blocks, optional)
    validation.check_shapes(x, blocks, layout_sizes(layout), optional)


def _derivative_needs_slope(activation: int, residual: torch.Tensor | None) -> bool:
    # ReLU's derivative can be read off its output, unless a residual hides it.
    return activation != NONE and not (activation == RELU and residual is None)
