"""Autocast, tf32 and dtypes."""

from __future__ import annotations

import pytest
import torch

from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference

from .helpers import DEVICES, make_call, make_layout, xor_grid


def _call(device, dtype=torch.float32, **options):
    layout = make_layout(xor_grid(4, 4), 16)
    return make_call(layout, tokens=33, rank=16, residual=True, device=device, dtype=dtype,
                     **options)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_everything_and_gradients_come_back_in_float32(device, dtype):
    call = _call(device, activation="gelu")
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    with torch.autocast(device, dtype=dtype):
        y = butterfly_lowrank_mm(**inputs, layout=call.layout, activation="gelu")
    assert y.dtype == dtype
    y.float().square().sum().backward()
    rounded = call.to(dtype)
    rounded.dy = (2 * y.detach().float()).to(dtype)
    expected = rounded.run()
    torch.testing.assert_close(y, expected["y"])
    for name, t in inputs.items():
        assert t.grad.dtype == torch.float32
        torch.testing.assert_close(t.grad, expected[f"d{name}"].float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_float32_weights_are_not_rounded(device, compiled):
    """Products of rounded operands, summed in float32 and left there (CPUs round by the chunk)."""
    call = _call(device, grad=False)
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    operator = torch.compile(butterfly_lowrank_mm, fullgraph=True) if compiled else (
        butterfly_lowrank_mm
    )  # fmt: skip
    with torch.autocast(device, dtype=torch.bfloat16):
        y = operator(**inputs, layout=call.layout)
    dy = torch.randn_like(y)
    y.backward(dy)
    rounded = call.to(torch.bfloat16).to(torch.float64)
    rounded.dy = dy.double()
    expected = rounded.run(butterfly_lowrank_mm_reference)
    for name in ("blocks", "bias"):  # those of u and v come from rounded t and s
        got, want = inputs[name].grad, expected[f"d{name}"]
        assert got.dtype == torch.float32
        bound = 4e-3 if name == "blocks" and device == "cpu" else 1e-5
        assert (got.double() - want).norm() < bound * want.norm(), name
    for name in ("u", "v"):
        assert (inputs[name].grad.bfloat16() != inputs[name].grad).any(), name


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_accepts_mixed_dtypes(device):
    call = _call(device, grad=False)
    inputs = dict(call.inputs)
    inputs["x"] = inputs["x"].bfloat16()
    inputs["residual"] = inputs["residual"].half()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert butterfly_lowrank_mm(**inputs, layout=call.layout).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="blocks.dtype"):
        butterfly_lowrank_mm(**inputs, layout=call.layout)


def test_autocast_leaves_float64_alone():
    call = _call("cpu", dtype=torch.float64, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = butterfly_lowrank_mm(**call.inputs, layout=call.layout)
    expected = butterfly_lowrank_mm_reference(**call.inputs, layout=call.layout)
    torch.testing.assert_close(y, expected)


def test_autocast_does_not_reach_into_the_cpu_kernel():
    """bfloat16 is computed in float32 inside; autocast must not round those products again."""
    call = _call("cpu", dtype=torch.bfloat16, grad=False)
    plain = butterfly_lowrank_mm(**call.inputs, layout=call.layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(butterfly_lowrank_mm(**call.inputs, layout=call.layout), plain)


@pytest.mark.gpu
def test_tf32_follows_the_matmul_setting():
    layout = make_layout(xor_grid(8, 8), 64)
    call = make_call(layout, tokens=512, rank=64, device="cuda", dtype=torch.float32)
    exact = call.to(torch.float64).run(butterfly_lowrank_mm_reference)
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            got = call.run()
            errors[precision] = {n: (got[n].double() - exact[n]).abs().max() for n in exact}
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, scale in ((n, t.abs().max()) for n, t in exact.items()):
        assert errors["ieee"][name] < 1e-5 * scale, name
        if name not in ("dbias",):
            assert 1e-6 * scale < errors["tf32"][name] < 5e-3 * scale, name
