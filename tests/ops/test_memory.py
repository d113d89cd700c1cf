"""What the operator keeps for the backward pass, and how it lives with checkpointing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pixelfly.ops import butterfly_lowrank_mm
from pixelfly.ops.plan import device_plan

from .helpers import DEVICES, check_call, make_call, make_layout, xor_grid

TOKENS, RANK = 11, 8


def _saved_shapes(call) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(t.shape))
        return t

    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        butterfly_lowrank_mm(**inputs, layout=call.layout, activation=call.activation)
    return shapes


@pytest.mark.parametrize(
    ("activation", "residual", "kept"),
    [(None, True, False), ("relu", False, True), ("relu", True, True), ("gelu", False, True)],
)
def test_slope_is_kept_only_if_the_activation_needs_it(activation, residual, kept):
    layout = make_layout(xor_grid(8, 4), 16)
    call = make_call(layout, tokens=TOKENS, rank=RANK, activation=activation, residual=residual)
    shapes = _saved_shapes(call)
    assert shapes.count((TOKENS, layout.out_features)) == kept
    assert shapes.count((TOKENS, layout.in_features)) == 1
    assert shapes.count((TOKENS, RANK)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slopes_take_a_byte_beside_bfloat16(dtype):
    layout = make_layout(xor_grid(4, 4), 16)
    call = make_call(layout, tokens=TOKENS, activation="gelu", residual=True, dtype=dtype)
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items() if name != "x"}
    kept: dict[torch.dtype, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.shape[0] == TOKENS:
            kept[t.dtype] = kept.get(t.dtype, 0) + t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        butterfly_lowrank_mm(call.inputs["x"], **inputs, layout=layout, activation="gelu")
    size = TOKENS * layout.in_features * dtype.itemsize
    codes = TOKENS * layout.out_features
    assert kept == ({dtype: size, torch.uint8: codes} if dtype == torch.bfloat16
                    else {dtype: 2 * size})  # fmt: skip


def test_relu_without_residual_keeps_its_output_not_another_tensor():
    layout = make_layout(xor_grid(4, 4), 16)
    call = make_call(layout, tokens=TOKENS, activation="relu")
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    pointers = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pointers.append(t.data_ptr()) or t, lambda t: t
    ):
        y = butterfly_lowrank_mm(**inputs, layout=layout, activation="relu")
    assert y.data_ptr() in pointers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_input_is_not_kept_for_frozen_weights(device, activation):
    layout = make_layout(xor_grid(8, 4), 16)
    call = make_call(layout, tokens=TOKENS, rank=RANK, activation=activation, device=device,
                     dtype=torch.float32)  # fmt: skip
    check_call(call, needs=("x",))
    frozen = {name: t for name, t in call.inputs.items() if name != "x"}
    x = call.inputs["x"].requires_grad_()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        butterfly_lowrank_mm(x, **frozen, layout=layout, activation=activation)
    assert (TOKENS, layout.in_features) not in shapes
    assert (TOKENS, RANK) not in shapes


def test_nothing_is_kept_without_gradients():
    call = make_call(make_layout(xor_grid(4, 4), 16), rank=RANK, activation="gelu", grad=False)
    y = butterfly_lowrank_mm(**call.inputs, layout=call.layout, activation="gelu")
    assert y.grad_fn is None
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    with torch.no_grad():
        y = butterfly_lowrank_mm(**inputs, layout=call.layout, activation="gelu")
    assert y.grad_fn is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device, reentrant):
    layout = make_layout(xor_grid(4, 4), 16)
    call = make_call(layout, rank=RANK, activation="gelu", device=device, dtype=torch.float32)
    expected = call.run()
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    options = {name: t for name, t in inputs.items() if name != "x"}

    def layer(x):
        return butterfly_lowrank_mm(x, **options, layout=layout, activation="gelu")

    y = checkpoint(layer, inputs["x"], use_reentrant=reentrant)
    grads = torch.autograd.grad if not reentrant else None
    if grads is None:
        y.backward(call.dy)
        got = {name: t.grad for name, t in inputs.items()}
    else:
        got = dict(zip(inputs, grads(y, list(inputs.values()), call.dy), strict=True))
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[f"d{name}"])


def test_threads_that_meet_new_layouts_at_once():
    layouts = [make_layout(torch.eye(n).bool(), 16) for n in range(3, 19)]
    results: dict[int, torch.Tensor] = {}

    def first_call(i: int) -> None:
        results[i] = device_plan(layouts[i], 0, torch.device("cpu"))

    threads = [threading.Thread(target=first_call, args=(i,)) for i in range(len(layouts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, layout in enumerate(layouts):
        assert results[i][3] == layout.out_features
        assert device_plan(layout, 0, torch.device("cpu"))[3] == layout.out_features


def test_meta_tensors():
    """Shapes without memory: what model summaries and deferred initialisation run on."""
    call = make_call(make_layout(xor_grid(4, 2), 16), rank=RANK, dtype=torch.float32)
    inputs = {name: t.to("meta").requires_grad_() for name, t in call.inputs.items()}
    y = butterfly_lowrank_mm(**inputs, layout=call.layout)
    y.sum().backward()
    assert y.is_meta and y.shape == (7, 64)
    for name, t in inputs.items():
        assert t.grad.shape == call.inputs[name].shape


def test_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    layout = make_layout(xor_grid(4, 4), 16)
    call = make_call(layout, tokens=TOKENS, rank=RANK, dtype=torch.float32)
    weights = layout.nnz * 16 * 16 + RANK * (layout.out_features + layout.in_features)
    with FlopCounterMode(display=False) as counter:
        y = butterfly_lowrank_mm(
            **{n: t.requires_grad_() for n, t in call.inputs.items()}, layout=layout
        )
    assert counter.get_total_flops() == 2 * TOKENS * weights
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * TOKENS * weights
