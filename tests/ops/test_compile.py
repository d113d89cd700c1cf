"""torch.compile, torch.export, opcheck: the operator inside traced programs."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pixelfly.masks import BlockLayout
from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference
from pixelfly.ops.plan import device_plan, plan_header

from .helpers import DEVICES, make_call, make_layout, xor_grid


class Layer(torch.nn.Module):
    def __init__(self, layout: BlockLayout, rank: int, activation: str | None, device="cpu"):
        super().__init__()
        call = make_call(layout, rank=rank, grad=False, device=device, dtype=torch.float32)
        self.layout, self.activation = layout, activation
        for name in ("blocks", "u", "v", "bias"):
            value = call.inputs.get(name)
            self.register_parameter(name, None if value is None else torch.nn.Parameter(value))

    def forward(self, x, residual=None):
        return butterfly_lowrank_mm(
            x, self.blocks, self.layout, self.u, self.v, self.bias,
            activation=self.activation, residual=residual,
        )  # fmt: skip


class Network(torch.nn.Module):
    """Layers with equal layouts, different layouts and ranks, a residual and a reshape."""

    def __init__(self, device="cpu"):
        super().__init__()
        square = make_layout(xor_grid(4, 4), 16)
        self.first = Layer(square, 8, "gelu", device)
        self.second = Layer(make_layout(xor_grid(4, 4), 16), 8, "gelu", device)
        self.up = Layer(make_layout(xor_grid(4, 2), 32), 16, "silu", device)
        self.down = Layer(make_layout(xor_grid(2, 4), 32), 0, None, device)

    def forward(self, x):
        x = self.second(self.first(x))
        return self.down(self.up(x), residual=x)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    return (y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_forward_and_backward_with_any_number_of_tokens(device, backend):
    network = Network(device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    frames = []
    for tokens in (5, 7, 9, 33, 130, 64):
        x = torch.randn(tokens, 64, device=device)
        for got, expected in zip(_step(compiled, x), _step(network, x), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames[1:] == [2] * 5, f"compiled anew for a number of tokens: {frames}"


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dims_and_modes(device):
    network = Network(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 64), (4, 5, 64), (3, 2, 64)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(compiled(x), network(x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), network(x), atol=1e-5, rtol=1e-5)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, network(x))
    y.float().sum().backward()


def test_equal_layouts_share_a_graph_and_different_ones_do_not():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, blocks, layout: butterfly_lowrank_mm(x, blocks, layout),
        backend=counter, fullgraph=True,
    )  # fmt: skip
    eye = torch.eye(4).bool()
    expected_frames = 0
    for grid, is_another in ((eye, 1), (eye.flip(0), 1), (eye.clone(), 0), (eye.flip(0), 0)):
        layout = make_layout(grid, 16)
        x, blocks = torch.randn(6, 64), torch.randn(layout.nnz, 16, 16)
        expected = butterfly_lowrank_mm_reference(x, blocks, layout)
        torch.testing.assert_close(compiled(x, blocks, layout), expected, atol=1e-4, rtol=1e-4)
        expected_frames += is_another
        assert counter.frame_count == expected_frames


def test_copies_of_a_module_share_a_graph():
    layer = Layer(make_layout(xor_grid(4, 4), 16), 8, "relu")
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(3, 64)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        y = torch.compile(module, backend=counter, fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x))
    assert counter.frame_count == 1


def test_rank_that_varies():
    """u and v as plain tensors: dynamo makes their rank symbolic; the plan must still fit."""
    layout = make_layout(xor_grid(4, 4), 16)
    compiled = torch.compile(
        lambda x, b, u, v: butterfly_lowrank_mm(x, b, layout, u, v),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    for rank in (8, 16, 24):
        inputs = make_call(layout, rank=rank, dtype=torch.float32, bias=False, grad=False).inputs
        expected = butterfly_lowrank_mm_reference(**inputs, layout=layout)
        torch.testing.assert_close(compiled(*inputs.values()), expected, atol=1e-4, rtol=1e-4)


def test_global_layout_and_errors_in_traced_code():
    layout = make_layout(xor_grid(2, 2), 16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, blocks):
        return butterfly_lowrank_mm(x, blocks, layout)

    blocks = torch.randn(4, 16, 16)
    assert run(torch.randn(3, 32), blocks).shape == (3, 32)
    with pytest.raises(Exception, match="in_features=32"):
        run(torch.randn(3, 48), blocks)


@pytest.mark.parametrize("strict", [False, True])
def test_export_saves_and_loads(strict):
    network = Network().eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(
        network, (torch.randn(6, 64),), dynamic_shapes=({0: tokens},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (3, 17):
        x = torch.randn(count, 64)
        torch.testing.assert_close(loaded(x), network(x))


def test_first_call_while_exporting_leaves_a_real_plan():
    """Exporting runs under fake tensors; the plan uploaded there must serve eager calls too."""
    layout = make_layout(torch.rand(5, 3) < 0.5, 16)
    layer = Layer(layout, 8, None)
    x = torch.randn(4, 48)
    torch.export.export(layer, (x,), strict=False)
    plan = device_plan(layout, 8, x.device)
    assert type(plan) is torch.Tensor
    assert layer(x).shape == (4, 80)


def test_first_call_in_inference_mode_leaves_a_plan_for_training():
    layout = make_layout(torch.rand(5, 2) < 0.5, 16)
    layer = Layer(layout, 8, None)
    with torch.inference_mode():
        layer(torch.randn(4, 32))
    assert not device_plan(layout, 8, torch.device("cpu")).is_inference()
    layer(torch.randn(4, 32)).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 8, 40])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_opcheck(device, rank, activation):
    layout = make_layout(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]]).bool(), 16, (8, 8))
    call = make_call(layout, rank=rank, device=device, dtype=torch.float32)
    inputs = call.inputs
    leaves = [None if t is None else t.detach().requires_grad_()
              for t in (inputs[n] if n in inputs else None
                        for n in ("x", "blocks", "u", "v", "bias"))]  # fmt: skip
    plan = device_plan(layout, rank, inputs["x"].device)
    header = plan_header(layout, rank, inputs["x"].device)
    arguments = (*leaves, None, plan, header, activation, True, False)
    linear = torch.ops.pixelfly.linear.default
    # Stride-0 gradients of the operator's unused outputs are what makes these tests worth running.
    torch.library.opcheck(linear, (*arguments, None, False))
    torch.library.opcheck(linear, (*arguments, torch.randn_like(leaves[0]), True))
    x, blocks, u, v, *rest = (p.detach() if isinstance(p, torch.Tensor) else p for p in arguments)
    forward = torch.ops.pixelfly.forward.default
    torch.library.opcheck(forward, (x, blocks, u, v, *rest))
    _, t, slope = forward(x, blocks, u, v, *rest)
    for slopes in ((None, None), (slope, torch.randn_like(x))):
        torch.library.opcheck(
            torch.ops.pixelfly.backward.default,
            (call.dy, x, blocks, u, v, t, slopes[0], plan, header, activation == 1,
             False, False, True, True, rank > 0, rank > 0, True, slopes[1], False),
        )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_makes_operands_in_their_own_shape(device):
    """And hands us a view: in the view's shape there would be more indices to take apart."""
    layout = make_layout(xor_grid(4, 4), 16)
    call = make_call(layout, device=device, dtype=torch.float32, grad=False)

    def network(x, z, blocks, layout):
        rows = (x * z).transpose(0, 1).reshape(-1, x.shape[-1])
        return butterfly_lowrank_mm(rows, blocks, layout)

    x, z = torch.randn(2, 4, 6, 64, device=device)
    arguments = x, z, call.inputs["blocks"], layout
    compiled = torch.compile(network, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        y, (code, *_) = torch._inductor.utils.run_and_get_code(compiled, *arguments)
    torch.testing.assert_close(y, network(*arguments))
    assert re.search(r"pixelfly.forward.default\(reinterpret_tensor\(", code)


@pytest.mark.gpu
def test_reduce_overhead_replays_without_copies():
    """CUDA graphs of torch.compile give the right results, step after step."""
    network = Network("cuda")
    compiled = torch.compile(network, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(64, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in _step(compiled, x)]
        for ours, expected in zip(got, _step(network, x), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
