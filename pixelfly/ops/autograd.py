"""Fakes and FLOP counts of the operators `pixelfly::forward` and `backward`, and `linear`, which
makes one differentiable function of them.

Schemas are defined in csrc/torch/library.cpp, CUDA kernels beside them, CPU kernels in cpu.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .activations import NONE, RELU, empty_slope
from .plan import Header
from .rounding import round_weights


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _tell_inductor() -> None:
    """Lets inductor make our operands in the shape they are computed in, as it does for matmuls.

    Left alone it makes them in the shape we are given, that of a view: for ViT's stack of dq, dk
    and dv two thirds more time. Called while tracing, when inductor has been imported if it will be
    used; importing it here would double the time `import pixelfly` takes.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    operators = (torch.ops.pixelfly.forward.default, torch.ops.pixelfly.backward.default)
    if lowering is None or operators[0] in lowering.lowerings:
        return

    def realize(node: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for arg in args:
            if isinstance(arg, lowering.TensorBox):
                arg.realize()
        return lowering.constrain_to_fx_strides(node, *args, **kwargs)

    for operator in operators:
        lowering.make_fallback(operator, realize, warn=False)


def _forward_fake(
    x, blocks, u, v, bias, residual, plan, header, activation, save_slope, allow_tf32
):
    _tell_inductor()
    n, t = Header.parse(header).out_features, None
    if u is not None:
        # Rows of t are padded to 16 bytes so that kernels can read them as vectors.
        rank = u.shape[1]
        t = x.new_empty(x.shape[0], _round_up(rank, 8))[:, :rank]
    return x.new_empty(x.shape[0], n), t, empty_slope(x, n) if save_slope else None


def _backward_fake(
    dy, x, blocks, u, v, t, slope, plan, header, relu, allow_tf32, deterministic,
    need_dx, need_dblocks, need_du, need_dv, need_dbias, x_slope, float32_grads, dy_k=None,
    dy_v=None,
):  # fmt: skip
    _tell_inductor()
    h = Header.parse(header)
    dtype = torch.float32 if float32_grads else dy.dtype
    return (
        dy.new_empty(dy.shape[0], h.in_features) if need_dx else None,
        dy.new_empty(blocks.shape, dtype=dtype) if need_dblocks else None,
        dy.new_empty(u.shape, dtype=dtype) if need_du else None,
        dy.new_empty(v.shape, dtype=dtype) if need_dv else None,
        dy.new_empty(h.out_features, dtype=dtype) if need_dbias else None,
    )


# Of linear's arguments, what forward takes: x_slope and dy_is_dz say where gradients go.
FORWARD_ARGUMENTS = 11

# Overloads, not packets, which choose one at every call.
forward_operator = torch.ops.pixelfly.forward.default
_backward_op = torch.ops.pixelfly.backward.default
_unsafe_view = torch.ops.aten._unsafe_view.default


def backward_operator() -> Callable[..., Any]:
    """`pixelfly::backward`; under create_graph=True with gradients that refuse to be
    differentiated."""
    return _Backward.apply if torch.is_grad_enabled() else _backward_op


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd is to differentiate a function of these tensors."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Flattens the leading dims; copies only if the last dim is strided or rows overlap."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return x.contiguous()
    return x


def unflatten_rows(y: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Gives fresh rows the leading dims of `shape`."""
    if len(shape) == 2:
        return y
    # Not a view, as far as autograd and FSDP are concerned: nobody else sees y.
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))


class _Linear(torch.autograd.Function):
    """`pixelfly::forward` with its derivative; returns y, and the slope where dy_is_dz.

    x, the residual and y may have any leading dims, slopes are rows: what shapes there are
    between costs no nodes of autograd's graph.
    """

    @staticmethod
    def forward(
        ctx, x, blocks, u, v, bias, residual, plan, header, activation, save_slope, allow_tf32,
        x_slope, dy_is_dz,
    ):  # fmt: skip
        float32_grads = x.dtype != torch.float32 == blocks.dtype
        rows = as_rows(x)
        blocks, u, v, bias = round_weights(x.dtype, blocks, u, v, bias)
        y, t, slope = forward_operator(
            rows, blocks, u, v, bias, None if residual is None else as_rows(residual), plan,
            header, activation, save_slope, allow_tf32,
        )  # fmt: skip
        y = unflatten_rows(y, x.shape)
        # Unused outputs then come as None instead of as tensors of zeros.
        ctx.set_materialize_grads(False)
        given = slope if dy_is_dz else None
        if given is not None:
            ctx.mark_non_differentiable(given)
        needs = ctx.needs_input_grad
        if activation == NONE or dy_is_dz:
            slope = None
        elif activation == RELU and residual is None:
            slope = y  # positive where the slope is, and somebody keeps it anyway
        elif not save_slope and any(needs[:5]):
            raise RuntimeError(
                "pixelfly::linear: save_slope must be True when an activation is to be "
                "differentiated, got False"
            )
        if dy_is_dz and needs[5]:
            raise RuntimeError("pixelfly::linear: with dy_is_dz the residual gets no gradient")
        if not any(needs[1:5]):
            rows = t = None  # frozen weights: dx needs neither
        ctx.save_for_backward(rows, blocks, u, v, t, slope, plan, x_slope)
        ctx.x_shape, ctx.options = x.shape, (header, activation == RELU, allow_tf32)
        ctx.float32_grads = float32_grads
        return y, given

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        """Gradients from that of y.

        Two layers share an activation's derivative by what travels between them: the later one,
        given x_slope, hands back its x's gradient times x_slope, and the earlier one, told
        dy_is_dz, takes that as the gradient of its pre-activation. Nobody else may use the tensor
        between them.
        """
        grads: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dy is None:
            return tuple(grads)
        x, blocks, u, v, t, slope, plan, x_slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if any(needs):
            # Gradients arrive expanded (from a sum) or transposed: the kernels want rows.
            grads[:5] = backward_operator()(
                as_rows(dy), x, blocks, u, v, t, None if slope is None else as_rows(slope), plan,
                *ctx.options, torch.are_deterministic_algorithms_enabled(), *needs, x_slope,
                ctx.float32_grads,
            )  # fmt: skip
            if needs[0] and len(ctx.x_shape) != 2:
                grads[0] = grads[0].view(ctx.x_shape)
        if ctx.needs_input_grad[5]:
            grads[5] = dy
        return tuple(grads)


class _Backward(torch.autograd.Function):
    """`pixelfly::backward`, and an error instead of its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor | None, ...]:
        return _backward_op(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "butterfly_lowrank_mm: double backward is not implemented; for gradients of gradients "
            "use pixelfly.ops.reference.butterfly_lowrank_mm_reference, which torch differentiates "
            "any number of times"
        )


_NO_TORCH_FUNC = (
    "butterfly_lowrank_mm: derivatives by torch.func are not implemented, nor are forward-mode "
    "ones; use torch.autograd, or pixelfly.ops.butterfly_lowrank_mm_reference inside torch.func"
)


def run_linear(*args: Any, needs_grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes `pixelfly::linear`; x, the residual and y may have any leading dims.

    Eager code calls it as it is and need not go through the dispatcher.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(args)
    if not needs_grad:
        x, *weights, residual = args[:6]
        y, _, _ = forward_operator(
            as_rows(x), *round_weights(x.dtype, *weights),
            None if residual is None else as_rows(residual), *args[6:FORWARD_ARGUMENTS],
        )  # fmt: skip
        return unflatten_rows(y, x.shape), None
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NO_TORCH_FUNC)
    return _Linear.apply(*args)


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    """Forward-mode derivatives, which the operator would drop without a word."""
    x = args[0]
    # Outside torch.func the CPU's kernels are torch's operators, which carry tangents.
    if x.is_cuda or torch._C._are_functorch_transforms_active():
        for arg in args:
            if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise RuntimeError(_NO_TORCH_FUNC)


def _linear(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return run_linear(*args, needs_grad=needs_grad)


def _kept_weights(header: str, rank: int) -> int:
    h = Header.parse(header)
    return h.nnz * h.block_size**2 + rank * (h.out_features + h.in_features)


def _forward_flops(x_shape, blocks_shape, u_shape, v_shape, bias_shape, residual_shape,
                   plan_shape, header, *args, out_shape=None, **kwargs) -> int:  # fmt: skip
    rank = 0 if u_shape is None else u_shape[1]
    return 2 * x_shape[0] * _kept_weights(header, rank)


def _backward_flops(dy_shape, x_shape, blocks_shape, u_shape, v_shape, t_shape, slope_shape,
                    plan_shape, header, relu, allow_tf32, deterministic, need_dx,
                    need_dblocks, need_du, need_dv, *args, out_shape=None,
                    **kwargs) -> int:  # fmt: skip
    h = Header.parse(header)
    tokens, rank = dy_shape[0], 0 if u_shape is None else u_shape[1]
    block_flops = 2 * tokens * h.nnz * h.block_size**2
    thin = [2 * tokens * rank * width for width in (h.out_features, h.in_features)]
    flops = block_flops * (need_dx + need_dblocks)
    flops += thin[0] * (bool(need_dx or need_dv) + need_du)  # s = dz · u, du
    return flops + thin[1] * (need_dx + need_dv)  # s · v, dv


def _vmap_rule(operator: Any) -> Callable[..., Any]:
    """One call after another: the fallback of torch.vmap, which serves no optional results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def one(i: int) -> tuple[torch.Tensor | None, ...]:
            selected = zip(args, in_dims, strict=True)
            return operator(*(a if d is None else a.select(d, i).contiguous() for a, d in selected))

        calls = [one(i) for i in range(info.batch_size)]
        outputs = [None if o[0] is None else torch.stack(o) for o in zip(*calls, strict=True)]
        return tuple(outputs), tuple(None if o is None else 0 for o in outputs)

    return rule


def register(library: torch.library.Library) -> None:
    """Attaches fakes, vmap rules, FLOP formulas and `linear`; called once, on import."""
    torch.library.register_fake("pixelfly::forward", _forward_fake)
    torch.library.register_fake("pixelfly::backward", _backward_fake)
    for operator in (torch.ops.pixelfly.forward, torch.ops.pixelfly.backward):
        torch.library.register_vmap(operator.default, _vmap_rule(operator))
    library.impl("linear", _linear, "CompositeImplicitAutograd")
    register_flop_formula(torch.ops.pixelfly.forward)(_forward_flops)
    register_flop_formula(torch.ops.pixelfly.backward)(_backward_flops)
