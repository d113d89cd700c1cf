"""CUDA graphs, streams, devices and sizes beyond 32 bits."""

from __future__ import annotations

import threading

import pytest
import torch

from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference

from .helpers import check_against, check_call, make_call, make_layout, xor_grid

pytestmark = pytest.mark.gpu


def _call(**options):
    layout = options.pop("layout", None) or make_layout(xor_grid(8, 8), 64)
    return make_call(layout, **{"tokens": 256, "rank": 64, "activation": "gelu", "device": "cuda",
                                "dtype": torch.bfloat16, **options})  # fmt: skip


def test_graph_capture_and_replay():
    call = _call(residual=True)
    expected = call.run()
    static = {name: t.clone().requires_grad_() for name, t in call.inputs.items()}
    dy = call.dy.clone()

    def step():
        y = butterfly_lowrank_mm(**static, layout=call.layout, activation="gelu")
        return (y, *torch.autograd.grad(y, list(static.values()), dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for scale in (1.0, -2.0, 0.5):
        with torch.no_grad():
            static["x"].copy_(call.inputs["x"] * scale)
        for t in outputs:
            if t.data_ptr() != dy.data_ptr():  # the residual's gradient is dy itself
                t.detach().fill_(float("nan"))
        graph.replay()
        got = dict(zip(expected, outputs, strict=True))
        call_scaled = _scaled(call, scale)
        for name, value in call_scaled.run().items():
            torch.testing.assert_close(got[name].detach(), value, msg=f"{name} x{scale}")


def check_without_waits(chain):
    """Calls give the same whether the host waits between them or not, eager and captured."""
    expected = chain(torch.cuda.synchronize)
    torch.testing.assert_close(chain(lambda: None), expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    for _ in range(3):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
def test_few_tokens_wait_for_what_comes_before(tokens):
    """A dependent launch starts early: it must see all that the kernels before it wrote."""
    call = _call(tokens=tokens, grad=False)
    first = call.inputs.pop("x")
    weights = {name: t.clone() for name, t in call.inputs.items()}

    def chain(between):
        x = first
        for i in range(12):
            weights["blocks"].copy_(call.inputs["blocks"] * (1 - 2 * (i % 2)))
            between()
            x = butterfly_lowrank_mm(x, **weights, layout=call.layout)
            between()
            x = butterfly_lowrank_mm(x, **weights, layout=call.layout, activation="gelu")
            between()
        return [x]

    check_without_waits(chain)


@pytest.mark.parametrize("tokens", [300, 4096])
@pytest.mark.parametrize("rank", [0, 64, 136])
def test_hopper_kernels_wait_for_what_comes_before(monkeypatch, tokens, rank):
    """Products, thin products and gradients of weights start early, too, one behind the other."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for Hopper GPUs")
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")
    call = _call(tokens=tokens, rank=rank, activation=None)
    inputs = {name: t.detach().clone().requires_grad_() for name, t in call.inputs.items()}

    def chain(between):
        results = []
        for i in range(6):
            with torch.no_grad():  # written just before a product reads it
                inputs["bias"].copy_(call.inputs["bias"] * (i + 1))
                inputs["blocks"].copy_(call.inputs["blocks"] * (1 - 2 * (i % 2)))
            between()
            y = butterfly_lowrank_mm(**inputs, layout=call.layout)
            between()
            z = butterfly_lowrank_mm(**inputs | {"x": y}, layout=call.layout)
            between()
            results += [y, z, *torch.autograd.grad(z, list(inputs.values()), call.dy)]
        return [t.detach() for t in results]

    check_without_waits(chain)


def test_gradients_that_the_forced_kernel_lacks(monkeypatch):
    """Blocks of 16, those of weights alone: no product refuses first."""
    call = _call(layout=make_layout(xor_grid(8, 8), 16), rank=0, activation=None)
    weights = {name: t.detach().requires_grad_(name != "x") for name, t in call.inputs.items()}
    y = butterfly_lowrank_mm(**weights, layout=call.layout)
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")
    with pytest.raises(RuntimeError, match="cannot serve this weight gradient"):
        torch.autograd.grad(y, weights["blocks"], call.dy)


def _scaled(call, scale):
    inputs = dict(call.inputs)
    inputs["x"] = inputs["x"] * scale
    return type(call)(call.layout, inputs, call.activation, call.dy)


def test_capture_without_warm_up_says_what_to_do():
    call = _call(layout=make_layout(torch.eye(5).bool(), 32), rank=8, grad=False)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="warm-up call"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            butterfly_lowrank_mm(**call.inputs, layout=call.layout)


def test_side_stream():
    """The operator must run on the current stream: a copy queued before it there is seen."""
    call = _call(tokens=4096, grad=False)
    expected = call.run()["y"]
    x = torch.empty_like(call.inputs["x"])
    options = {k: v for k, v in call.inputs.items() if k != "x"}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(call.inputs["x"])
        y = butterfly_lowrank_mm(x, **options, layout=call.layout, activation="gelu")
        y = y.clone()
    stream.synchronize()
    torch.testing.assert_close(y, expected)


def test_first_call_on_a_side_stream_then_another_stream():
    """The plan is complete for every stream once the first call returned."""
    layout = make_layout(torch.rand(7, 9) < 0.4, 32)
    call = _call(layout=layout, rank=8)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        call.run()
    check_call(call)


def test_thread_without_a_cuda_context():
    call = _call(tokens=512)
    inputs = {name: t.detach() for name, t in call.inputs.items()}

    def run():
        return butterfly_lowrank_mm(**inputs, layout=call.layout, activation="gelu")

    expected = run()
    run()  # its memory returns to torch's cache: the thread below needs no allocation of CUDA's
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    call = _call(grad=True)
    expected = call.run()
    inputs = {k: v.to("cuda:1") for k, v in call.inputs.items()}
    got = type(call)(call.layout, inputs, call.activation, call.dy.to("cuda:1")).run()
    for name, value in got.items():
        assert value.device == torch.device("cuda", 1)
        torch.testing.assert_close(value.cpu(), expected[name].cpu())


def _free_gigabytes() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 64])
def test_more_than_two_to_the_31_elements(rank):
    """T · K and T · N beyond 2^31: the last tokens must be as right as the first."""
    if _free_gigabytes() < 60:
        pytest.skip("needs 60 GB of GPU memory")
    layout = make_layout(xor_grid(16, 16), 64)
    k = layout.in_features
    tokens = 2**31 // k + 1000
    call = make_call(layout, tokens=8, rank=rank, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, k, device="cuda", dtype=torch.bfloat16)
    x = x.repeat(tokens // 4096 + 1, 1)[:tokens].requires_grad_()
    options = {n: t.requires_grad_() for n, t in call.inputs.items() if n != "x"}
    y = butterfly_lowrank_mm(x, **options, layout=layout)
    dy = torch.zeros_like(y)
    dy[-500:] = torch.randn(500, y.shape[1], device="cuda", dtype=y.dtype)
    grads = dict(zip(("x", *options), torch.autograd.grad(y, (x, *options.values()), dy),
                     strict=True))  # fmt: skip
    tail = type(call)(layout, {"x": x.detach()[-500:], **options}, None, dy[-500:])
    same = tail.run(butterfly_lowrank_mm_reference)
    exact = tail.to(torch.float64).run(butterfly_lowrank_mm_reference)
    for name in exact:
        got = y.detach()[-500:] if name == "y" else grads[name[1:]]
        got = got[-500:] if name == "dx" else got
        check_against(got, same[name], exact[name], name, 64)
    assert torch.equal(y[:4096], y[4096:8192])
