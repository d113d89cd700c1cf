"""Leading dims, strides and expanded tensors, in and out."""

from __future__ import annotations

import pytest
import torch

from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference

from .helpers import DEVICES, make_call, make_layout, xor_grid


def _setup(device, tokens, rank=8, residual=False):
    layout = make_layout(xor_grid(4, 4), 16, (8, 0))
    dtype = torch.float32
    return make_call(layout, tokens=tokens, rank=rank, residual=residual, device=device,
                     dtype=dtype)  # fmt: skip


def _compare(call, x, residual=None, dy=None):
    options = {k: call.inputs[k] for k in ("u", "v", "bias")}
    blocks = call.inputs["blocks"]
    results = []
    for fn in (butterfly_lowrank_mm, butterfly_lowrank_mm_reference):
        leaf = x.detach().requires_grad_()
        w = blocks.detach().clone().requires_grad_()
        y = fn(leaf, w, call.layout, residual=residual, **options)
        results.append((y, *torch.autograd.grad(y, (leaf, w), torch.ones_like(y)
                                                if dy is None else dy)))  # fmt: skip
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
class TestInputs:
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
    def test_leading_dims(self, device, shape):
        call = _setup(device, shape)
        _compare(call, call.inputs["x"])

    def test_row_stride(self, device):
        call = _setup(device, 9)
        wide = torch.randn(9, 128, device=device)
        _compare(call, wide[:, 64:])
        _compare(call, wide[::2, :64])

    def test_unaligned_rows(self, device):
        """Rows that start off a 16-byte boundary, as slices of wider tensors do."""
        call = _setup(device, 9)
        for width, begin in ((67, 0), (72, 3), (65, 1)):
            _compare(call, torch.randn(9, width, device=device)[:, begin : begin + 64])

    def test_transposed(self, device):
        call = _setup(device, 9)
        _compare(call, torch.randn(64, 9, device=device).t())
        _compare(call, torch.randn(3, 64, 4, device=device).transpose(1, 2))

    def test_expanded(self, device):
        call = _setup(device, 9)
        _compare(call, torch.randn(1, 64, device=device).expand(9, 64))
        _compare(call, torch.randn(9, 1, device=device).expand(9, 64))

    def test_residual_strides(self, device):
        call = _setup(device, 9)
        n = call.layout.out_features
        for residual in (
            torch.randn(n, 9, device=device).t(),
            torch.randn(1, n, device=device).expand(9, n),
            torch.randn(9, n + 3, device=device)[:, 3:],
        ):
            _compare(call, call.inputs["x"], residual)

    def test_parameters_strides(self, device):
        call = _setup(device, 9)
        plain = butterfly_lowrank_mm(**{**call.inputs, "layout": call.layout})
        strided = {k: t.t().contiguous().t() if t.dim() == 2 else t for k, t in call.inputs.items()}
        strided["blocks"] = call.inputs["blocks"].transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(butterfly_lowrank_mm(**strided, layout=call.layout), plain)


@pytest.mark.parametrize("device", DEVICES)
class TestGradients:
    def test_expanded(self, device):
        call = _setup(device, 9)
        n = call.layout.out_features
        for dy in (
            torch.ones((), device=device).expand(9, n),
            torch.randn(1, n, device=device).expand(9, n),
            torch.randn(9, 1, device=device).expand(9, n),
        ):
            _compare(call, call.inputs["x"], dy=dy)

    def test_strided(self, device):
        call = _setup(device, 9)
        n = call.layout.out_features
        _compare(call, call.inputs["x"], dy=torch.randn(n, 9, device=device).t())
        _compare(call, call.inputs["x"], dy=torch.randn(9, 3 * n, device=device)[:, n : 2 * n])
        _compare(call, call.inputs["x"], dy=torch.randn(9, n + 3, device=device)[:, 3:])

    def test_unused_output(self, device):
        """No gradient arrives: nothing runs and nothing is written."""
        call = _setup(device, 9)
        x = call.inputs["x"].requires_grad_()
        butterfly_lowrank_mm(**{**call.inputs, "x": x}, layout=call.layout)
        (dx,) = torch.autograd.grad((x * 2).sum(), x)
        assert torch.equal(dx, torch.full_like(x, 2))

    def test_tails_of_blocks_get_zero_gradient(self, device):
        layout = make_layout(torch.ones(2, 2).bool(), 32, (8, 24))
        call = make_call(layout, rank=8, device=device, dtype=torch.float32)
        grad = call.run()["dblocks"].view(2, 2, 32, 32)
        assert torch.count_nonzero(grad[1, :, 24:]) == 0
        assert torch.count_nonzero(grad[:, 1, :, 8:]) == 0
        y = call.run()["y"]
        blocks = call.inputs["blocks"].view(2, 2, 32, 32)
        blocks[1, :, 24:] = 1e4
        blocks[:, 1, :, 8:] = -1e4
        torch.testing.assert_close(call.run()["y"], y)


def test_output_can_be_changed_in_place():
    """As a dense layer's: residual connections are often written `y += x`."""
    for tokens in (9, (3, 3)):
        call = _setup("cpu", tokens)
        inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
        y = butterfly_lowrank_mm(**inputs, layout=call.layout)
        assert not y._is_view()
        y *= 2
        (dx,) = torch.autograd.grad(y, inputs["x"], call.dy)
        torch.testing.assert_close(dx, 2 * call.run()["dx"])


def test_inputs_are_not_changed():
    call = _setup("cpu", 9, residual=True)
    before = {name: t.clone() for name, t in call.inputs.items()}
    call.run()
    for name, t in call.inputs.items():
        assert torch.equal(t, before[name]), name


def test_saved_tensor_changed_in_place_is_an_error():
    call = _setup("cpu", 9)
    x = call.inputs["x"].clone().requires_grad_()
    scaled = x * 1.0
    y = butterfly_lowrank_mm(scaled, call.inputs["blocks"].requires_grad_(), call.layout)
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
