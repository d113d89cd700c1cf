"""Fakes, gradients and FLOP counts of the dispatcher operators `pixelfly::forward` and `backward`.

Schemas are defined in csrc/torch/library.cpp, CUDA kernels beside them, CPU kernels in cpu.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .activations import NONE, RELU
from .plan import Header


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _forward_fake(
    x, blocks, u, v, bias, residual, plan, header, activation, save_slope, allow_tf32,
    x_slope=None, dy_is_dz=False,
):  # fmt: skip
    n = Header.parse(header).out_features
    rank = 0 if u is None else u.shape[1]
    y = x.new_empty(x.shape[0], n)
    # Rows of t are padded to 16 bytes so that kernels can read them as vectors.
    t = x.new_empty(x.shape[0], _round_up(rank, 8))[:, :rank]
    slope = x.new_empty(x.shape[0], n) if save_slope else x.new_empty(0)
    return y, t, slope


def _backward_fake(
    dy, x, blocks, u, v, t, slope, plan, header, relu, allow_tf32, deterministic,
    need_dx, need_dblocks, need_du, need_dv, need_dbias, x_slope=None,
):  # fmt: skip
    def like(shape, needed):
        return x.new_empty(shape if needed else (0,))

    h = Header.parse(header)
    return (
        like((x.shape[0], h.in_features), need_dx),
        like(blocks.shape, need_dblocks),
        like((0,) if u is None else u.shape, need_du),
        like((0,) if v is None else v.shape, need_dv),
        like((h.out_features,), need_dbias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, blocks, u, v, _, residual, plan, header, activation, save_slope, allow_tf32 = inputs[:11]
    x_slope, dy_is_dz = inputs[11:] or (None, False)
    y, t, slope = output
    ctx.mark_non_differentiable(t, slope)
    # Unused outputs then come as None instead of as tensors of zeros.
    ctx.set_materialize_grads(False)
    if activation == NONE or dy_is_dz:
        slope = None
    elif activation == RELU and residual is None:
        slope = y  # positive where the slope is, and somebody keeps it anyway
    elif not save_slope and any(ctx.needs_input_grad[:5]):
        raise RuntimeError(
            "pixelfly::forward: save_slope must be True when an activation is to be "
            "differentiated, got False"
        )
    if dy_is_dz and ctx.needs_input_grad[5]:
        raise RuntimeError("pixelfly::forward: with dy_is_dz the residual gets no gradient")
    if not any(ctx.needs_input_grad[1:5]):
        x = t = None  # frozen weights: dx needs neither
    ctx.save_for_backward(x, blocks, u, v, t, slope, plan, x_slope)
    ctx.header, ctx.relu, ctx.allow_tf32 = header, activation == RELU, allow_tf32


def _forward_backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Gradients of `pixelfly::forward` from that of y.

    Two layers share an activation's derivative by what travels between them: the later one, given
    x_slope, hands back its x's gradient times x_slope, and the earlier one, told dy_is_dz, takes
    that as the gradient of its pre-activation. Nobody else may use the tensor between them.
    """
    grads: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dy is None:
        return tuple(grads)
    x, blocks, u, v, t, slope, plan, x_slope = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if any(needs):
        # Gradients arrive expanded (from a sum) or transposed: the kernels want rows.
        rows = dy
        if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
            rows = rows.contiguous()
        if x is None:
            # The operator wants their shapes; rows of stride 0 take no memory.
            tokens, rank = rows.shape[0], 0 if u is None else u.shape[1]
            x = rows.new_empty(1, Header.parse(ctx.header).in_features).expand(tokens, -1)
            t = rows.new_empty(1, rank).expand(tokens, -1)
        outputs = torch.ops.pixelfly.backward(
            rows, x, blocks, u, v, t, slope, plan, ctx.header, ctx.relu, ctx.allow_tf32,
            torch.are_deterministic_algorithms_enabled(), *needs, x_slope,
        )  # fmt: skip
        grads[:5] = [g if needed else None for g, needed in zip(outputs, needs, strict=True)]
    if ctx.needs_input_grad[5]:
        grads[5] = dy
    return tuple(grads)


class _EagerForward(torch.autograd.Function):
    """The registered formula without the 40 µs that torch.library's wrapper takes a call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.pixelfly.forward(*args)
        _setup_context(ctx, args, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the registered formula refuses it
            return _forward_backward(ctx, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_backward(ctx, *grads)


def call_forward(*args: Any, needs_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calls `pixelfly::forward`, differentiably, the fast way for eager or for traced code."""
    if not needs_grad or torch.compiler.is_compiling():
        return torch.ops.pixelfly.forward(*args)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "butterfly_lowrank_mm: derivatives by torch.func are not implemented; use "
            "torch.autograd, or pixelfly.ops.butterfly_lowrank_mm_reference inside torch.func"
        )
    return _EagerForward.apply(*args)


def _backward_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "butterfly_lowrank_mm: double backward is not implemented; for gradients of gradients "
        "use pixelfly.ops.reference.butterfly_lowrank_mm_reference, which torch differentiates "
        "any number of times"
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del ctx, inputs, output


def _kept_weights(header: list[int], rank: int) -> int:
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
    tokens, rank = x_shape[0], 0 if u_shape is None else u_shape[1]
    block_flops = 2 * tokens * h.nnz * h.block_size**2
    thin = [2 * tokens * rank * width for width in (h.out_features, h.in_features)]
    flops = block_flops * (need_dx + need_dblocks)
    flops += thin[0] * (bool(need_dx or need_dv) + need_du)  # s = dz · u, du
    return flops + thin[1] * (need_dx + need_dv)  # s · v, dv


def register() -> None:
    """Attaches fakes, autograd and FLOP formulas to the operators; called once, on import."""
    forward, backward = "pixelfly::forward", "pixelfly::backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, _forward_backward, setup_context=_setup_context)
    torch.library.register_autograd(
        backward, _backward_backward, setup_context=_backward_setup_context
    )
    register_flop_formula(torch.ops.pixelfly.forward)(_forward_flops)
    register_flop_formula(torch.ops.pixelfly.backward)(_backward_flops)
