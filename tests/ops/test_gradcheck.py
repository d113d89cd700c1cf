"""Numerical gradients in float64, over random layouts."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from pixelfly.ops import butterfly_lowrank_mm

from .helpers import ACTIVATIONS, DEVICES, check_call, make_call, make_layout

FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(activation, rank, residual):
    layout = make_layout(torch.tensor([[1, 0, 1], [0, 0, 0]]).bool(), 16, (8, 8))
    call = make_call(layout, tokens=3, rank=rank, activation=activation, residual=residual)
    names, tensors = zip(*call.inputs.items(), strict=True)
    tensors = tuple(t.detach().requires_grad_() for t in tensors)

    def run(*values):
        inputs = dict(zip(names, values, strict=True))
        return butterfly_lowrank_mm(**inputs, layout=layout, activation=activation)

    # fast_mode compares random projections of the Jacobian; 768 weights of a block are many.
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@st.composite
def calls(draw):
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["random", "rows", "empty", "full"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.1, 0.4, 0.8]))
    grid = torch.rand(rows, cols, generator=generator) < density
    if kind == "rows":  # rows that share their columns: one class
        grid = grid[:1].repeat(rows, 1)
    elif kind in ("empty", "full"):
        grid[:] = kind == "full"
    b = draw(st.sampled_from([16, 32, 64, 128]))
    tail = tuple(8 * draw(st.integers(0, b // 8 - 1)) for _ in range(2))
    return make_layout(grid, b, tail), {
        "tokens": draw(st.sampled_from([1, 2, 31, 64, 257])),
        "rank": draw(st.sampled_from([0, 8, 16, 72])),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "residual": draw(st.booleans()),
    }


@pytest.mark.parametrize("device", DEVICES)
@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_random_layouts(device, data):
    layout, options = data.draw(calls())
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    dtype = data.draw(st.sampled_from(dtypes if device == "cuda" else [torch.float64, *dtypes]))
    check_call(make_call(layout, device=device, dtype=dtype, **options))
