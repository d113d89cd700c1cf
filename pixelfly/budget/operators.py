"""What one operator costs: its matmul's FLOPs, or the bytes that it moves and at which rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .. import ops  # noqa: F401 (tells torch's counter the FLOPs of our operators)
from ..masks import AttentionLayout
from .rate import Work

CONVOLUTIONS = ("convolution", "unaligned convolution")
MATMULS = ("dense", "unaligned", "attention", *CONVOLUTIONS)
MOVED = ("pointwise", "mixed", "normalization", "reduction", "strided")
_ALIGNMENT = 16  # bytes: rows of other lengths are beyond the fast kernels of BLAS libraries

_aten = torch.ops.aten
# torch's counter knows the attention of GPUs alone; the CPU's computes the same.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_ATTENTION = {op for op in _FLOPS if "attention" in str(op)}
_CONVOLUTION = {op for op in _FLOPS if "convolution" in str(op)}
_FREE = {  # move nothing
    *(_aten._unsafe_view, _aten.lift_fresh, _aten.detach, _aten.alias, _aten._local_scalar_dense),
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty),
    _aten.new_empty_strided,
}
_WRITES = {_aten.fill_, _aten.zero_, _aten.zeros_like, _aten.ones_like, _aten.full_like}
# Where the first tensor gives its shape, is overwritten, or is read only where it is looked up.
_SKIPS_FIRST = {
    *(_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.nll_loss_forward),
    *(_aten.copy_, _aten.new_zeros, _aten.new_ones, _aten.new_full),
}
_NORM = {_aten.native_layer_norm, _aten.native_group_norm, _aten._fused_rms_norm}
# The gradient of the scale and shift of a normalization is a second pass, over columns.
_NORM_BACKWARD = {
    _aten.native_layer_norm_backward,
    _aten.native_group_norm_backward,
    _aten._fused_rms_norm_backward,
}


def is_matmul(packet: Any) -> bool:
    return packet in _FLOPS


def aligned(itemsize: int, *features: int) -> bool:
    """Whether rows of so many features start where a matmul's kernels can load them whole."""
    return all(n * itemsize % _ALIGNMENT == 0 for n in features)


def matmul(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[str, int, Work]:
    """Returns the kind of a matmul's rate, its MACs and its work.

    FLOPs of a causal attention's work are half of its MACs' FLOPs: kernels skip the upper half.
    """
    packet = func._overloadpacket
    flops = int(_FLOPS[packet](*args, **kwargs, out_val=out))
    if packet in _ATTENTION:
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        first = out[0] if isinstance(out, tuple) else out
        share = 0.5 if named.get("is_causal") else 1.0
        return "attention", flops // 2, Work(share * flops, _bytes((args, kwargs, first)))
    work = Work(flops, _bytes((args, kwargs, out)))
    if packet in _CONVOLUTION:
        # Input and output, or their gradients: fast kernels want channels side by side.
        maps = (args[0], out if isinstance(out, torch.Tensor) else args[1])
        whole = all(aligned(t.element_size(), t.shape[1]) for t in maps)
        return "convolution" if whole else "unaligned convolution", flops // 2, work
    matrices = [t for t in _tensors((args, out)) if t.dim() > 1]
    whole = all(aligned(t.element_size(), t.shape[-1]) for t in matrices)
    return "dense" if whole else "unaligned", flops // 2, work


def norm_work(elements: int, itemsize: int, training: bool = False) -> Work:
    """Returns the work of a normalization; training adds its backward with a scale's gradient.

    An operation an element counts as a FLOP: statistics are in float32 whatever the dtype, so half
    the bytes do not make these kernels twice as fast. Forward: x, y. Backward: dy, x, dx, and
    dy, x again.
    """
    passes, moved = (3, 2 + 3 + 2) if training else (1, 2)
    return Work(passes * elements, itemsize * moved * elements, passes)


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, layout: AttentionLayout
) -> tuple[int, Work]:
    """Returns the MACs of the kept blocks of `butterfly_attention`, and its work.

    Blocks at the edge count as far as the sequence goes, those on a causal diagonal whole.
    """
    scores = round(layout.density * q.shape[1] * layout.q_len * layout.kv_len)  # of all heads
    macs = q.shape[0] * scores * (q.shape[3] + v.shape[3])
    return macs, Work(2 * macs, _bytes((q, k, v, y)))


def moved(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> dict[str, Work]:
    """Returns what an operator that is not a matmul moves, by the kind of its rate.

    "reduction" sums columns, "normalization" looks at rows as a whole, "strided" reads in another
    order of dimensions than it writes, "mixed" has tensors of several floating-point dtypes; all
    reach less of the memory's bandwidth than "pointwise", all else.
    """
    packet = func._overloadpacket
    if func.is_view or packet in _FREE or func.namespace == "prim":
        return {}
    if packet in _WRITES:
        return {"pointwise": Work(0, _bytes(out))}
    read = (args[1:], kwargs) if packet in _SKIPS_FIRST else (args, kwargs)
    work = Work(0, _bytes((read, out)))
    if packet in _NORM:
        return {"normalization": Work(args[0].numel(), work.bytes)}
    if packet in _NORM_BACKWARD:
        # As norm_work has it: a pass for each of dx and dscale.
        passes = [(args[:2], dx) for dx in out[:2] if dx is not None]
        elements = args[0].numel() * len(passes)
        return {"normalization": Work(elements, _bytes(passes), len(passes))} if passes else {}
    if packet in (_aten.sum, _aten.mean) and _keeps_columns(args):
        return {"reduction": work}
    if _reorders(packet, read, out):
        return {"strided": work}
    dtypes = {t.dtype for t in _tensors((read, out)) if t.dim() and t.is_floating_point()}
    return {"mixed" if len(dtypes) > 1 else "pointwise": work}


def _keeps_columns(args: tuple) -> bool:
    x, dims = args[0], args[1] if len(args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not dims:
        return False
    return x.dim() > 1 and x.dim() - 1 not in {d % x.dim() for d in dims}


def _reorders(packet: Any, read: Any, out: Any) -> bool:
    """Whether tensors of one shape lie in memory in different orders of their dimensions."""
    inputs = list(_tensors(read))
    if packet in (_aten.cat, _aten.stack):
        return any(_order(t) != sorted(_order(t)) for t in inputs)
    full = [t for t in (*_tensors(out), *inputs) if t.dim() > 1]
    first = full[0] if full else None
    return any(t.shape == first.shape and _order(t) != _order(first) for t in full[1:])


def _order(t: torch.Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    if t.is_contiguous():
        return [i for i, n in enumerate(t.shape) if n > 1]
    dims = [i for i, n in enumerate(t.shape) if n > 1 and t.stride(i)]
    return sorted(dims, key=lambda i: -t.stride(i))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tree: Any) -> int:
    return sum(_tensor_bytes(t) for t in _tensors(tree))


def _tensor_bytes(t: torch.Tensor) -> int:
    if 0 not in t.stride():
        return t.numel() * t.element_size()
    size = t.element_size()  # an expanded dimension is read once
    for n, stride in zip(t.shape, t.stride(), strict=True):
        size *= n if stride else min(n, 1)
    return size
