"""`explain`: which kernels would serve a call, for people who wonder where the time goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _C
from ..masks import BlockLayout
from .activations import ACTIVATIONS, check_activation
from .cpu_schedule import Schedule, forward_schedule, transposed_schedule
from .device import check_device, thread_blocks
from .functional import matmul_allows_tf32
from .plan import Header, device_plan, host_plan, plan_header
from .validation import OP

_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtype.h


@dataclass(frozen=True)
class Explanation:
    """What would serve a call: print it.

    Attributes:
        device: where it runs.
        call: sizes, dtype and options in words.
        flops: multiply-adds times two of the forward pass; the backward pass has twice as many.
        kernels: `(step, kernel)` in the order in which forward and backward run them.
    """

    device: str
    call: str
    flops: int
    kernels: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(step) for step, _ in self.kernels)
        lines = [f"{OP} on {self.device}", f"  {self.call}", f"  forward: {self.flops:.3g} FLOP"]
        lines += [f"  {step:<{width}}  {kernel}" for step, kernel in self.kernels]
        return "\n".join(lines)


def _describe(schedule: Schedule, block_size: int) -> str:
    parts = [
        f"{b.classes} x [T, {b.cols * block_size}]·[{b.cols * block_size}, {b.rows * block_size}]"
        for b in schedule.batches[:4]
    ]
    if len(schedule.batches) > 4:
        parts.append(f"{len(schedule.batches) - 4} more sizes")
    return "ATen gather + bmm: " + (", ".join(parts) or "no blocks")


def _cpu_kernels(layout: BlockLayout, rank: int) -> list[tuple[str, str]]:
    device = torch.device("cpu")
    plan = device_plan(layout, rank, device)
    header = Header.parse(plan_header(layout, rank, device))
    forward = forward_schedule(plan, header)
    transposed = transposed_schedule(plan, header)
    grad = transposed if transposed.gathered < forward.gathered else forward
    kernels = [
        ("y", _describe(forward, layout.block_size)),
        ("dx", _describe(transposed, layout.block_size)),
        ("dblocks", _describe(grad, layout.block_size)),
    ]
    if rank:
        kernels.append(("t, s, du, dv", "ATen matmul"))
    return kernels


def explain(
    x: torch.Tensor, layout: BlockLayout, *, rank: int = 0, activation: str | None = None
) -> Explanation:
    """Returns a record of the kernels that would serve a call, without making it.

    Args:
        x: `[..., K]`; only its shape, dtype and device matter.
        layout: which blocks are kept.
        rank: of the low-rank term; 0 is none.
        activation: as for `butterfly_lowrank_mm`.

    Returns:
        An `Explanation`; `str()` of it is readable. On a GPU, the environment variable
        `PIXELFLY_KERNEL` (auto, sm80, few, split, all_rows, sm90) takes part in the choice, as in
        a call.

    Raises:
        ValueError: x does not fit the layout, or the activation is unknown.
        RuntimeError: no kernel serves x's device.

    Example:
        >>> import torch
        >>> from pixelfly.masks import flat_block_butterfly
        >>> layout = flat_block_butterfly(256, 256, block_size=32)
        >>> print(explain(torch.empty(8, 256), layout))  # doctest: +ELLIPSIS
        butterfly_lowrank_mm on cpu
        ...
    """
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise ValueError(
            f"explain: x.shape[-1] must be in_features={layout.in_features}, got {list(x.shape)}"
        )
    check_activation("explain: ", activation)
    check_device(x.device)
    n, k, b = layout.out_features, layout.in_features, layout.block_size
    tokens = x[..., 0].numel()
    if x.is_cuda:
        if x.dtype not in _DTYPE_NUMBERS:
            raise ValueError(f"explain: the GPU has no kernels for x.dtype={x.dtype}")
        rank += -rank % 8  # as the operator pads it
        properties = torch.cuda.get_device_properties(x.device)
        kernels = _C.explain(
            host_plan(layout, rank, thread_blocks(x.device)),
            _DTYPE_NUMBERS[x.dtype],
            tokens,
            ACTIVATIONS[activation],
            x.dtype == torch.float32 and matmul_allows_tf32(),
            torch.are_deterministic_algorithms_enabled(),
            10 * properties.major + properties.minor,
            properties.multi_processor_count,
            properties.shared_memory_per_block_optin,
        )
        device = f"{x.device} ({properties.name})"
    else:
        kernels, device = _cpu_kernels(layout, rank), str(x.device)
    return Explanation(
        device=device,
        call=(
            f"T={tokens}, {k}->{n}, {layout.nnz} blocks of {b} ({layout.density:.1%}), "
            f"rank {rank}, {str(x.dtype).removeprefix('torch.')}, activation {activation}"
        ),
        flops=2 * tokens * (layout.nnz * b * b + rank * (n + k)),
        kernels=tuple(kernels),
    )
