"""`butterfly_qkv`: q, k and v of one layer, whose backward takes their gradients one by one."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pixelfly.masks import flat_block_butterfly
from pixelfly.ops import Weights, butterfly_lowrank_mm, butterfly_qkv
from pixelfly.ops.plan import device_plan, plan_header

from .helpers import DEVICES

HEADS = 2
BACKWARD = torch.ops.pixelfly.backward.default


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_weights(rank=0, dtype=torch.float64, device="cpu", block_size=16, width=64) -> Weights:
    """Weights from `width` features to three times as many."""
    layout = flat_block_butterfly(3 * width, width, block_size=block_size)

    def rand(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=device) / 8
        return values.to(dtype).requires_grad_()

    low_rank = (rand(3 * width, rank), rand(rank, width)) if rank else (None, None)
    return Weights(rand(layout.nnz, block_size, block_size), layout, *low_rank, rand(3 * width))


def make_x(weights: Weights, shape=(2, 7), dtype=None) -> torch.Tensor:
    blocks = weights.blocks
    x = torch.randn(*shape, weights.layout.in_features, device=blocks.device)
    return x.to(dtype or blocks.dtype).requires_grad_()


def leaves(x: torch.Tensor, weights: Weights) -> list[torch.Tensor]:
    tensors = [t for t in (x, *weights) if isinstance(t, torch.Tensor)]
    return [t for t in tensors if t.requires_grad]


def separate(x: torch.Tensor, weights: Weights, heads: int) -> tuple[torch.Tensor, ...]:
    """What `butterfly_qkv` computes, made of other parts."""
    y = butterfly_lowrank_mm(x, *weights).unflatten(2, (3, heads, -1))
    return tuple(third.transpose(1, 2) for third in y.unbind(2))


def attention_grads(x: torch.Tensor, weights: Weights) -> list[torch.Tensor]:
    """Gradients of q, k and v as torch's fused attention hands them back: rows of tokens."""
    shape = (*x.shape[:2], HEADS, weights.layout.out_features // 3 // HEADS)
    dtype = weights.blocks.dtype
    return [torch.randn(shape, device=x.device).to(dtype).transpose(1, 2) for _ in range(3)]


def run(function, x, weights, dys) -> list[torch.Tensor]:
    """q, k and v, and the gradients of everything from those of theirs that are given."""
    thirds = function(x, weights, HEADS)
    used = [i for i in range(3) if dys[i] is not None]
    grads = torch.autograd.grad(
        [thirds[i] for i in used], leaves(x, weights), [dys[i].to(thirds[i].dtype) for i in used]
    )
    return [*thirds, *grads]


def compare(x, weights, dys, ours=butterfly_qkv, **tolerance) -> None:
    torch.testing.assert_close(
        run(ours, x, weights, dys), run(separate, x, weights, dys), **tolerance
    )


class Seen(TorchDispatchMode):
    """Collects the operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, func) -> list[tuple]:
        return [args for f, args in self.calls if f is func]


def tolerance(device, dtype=torch.float32):
    if dtype == torch.float64 and device == "cpu":
        return {}
    bound = 1e-3 if dtype == torch.float32 else 4e-2
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("given", list(itertools.product((True, False), repeat=3))[:-1])
def test_gradients_that_are_missing(device, rank, given):
    weights = make_weights(rank, torch.float32, device)
    x = make_x(weights)
    dys = [dy if g else None for dy, g in zip(attention_grads(x, weights), given, strict=True)]
    compare(x, weights, dys, **tolerance(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["nothing", "x", "weights", "blocks", "bias"])
def test_frozen(device, frozen):
    weights = make_weights(8, torch.float32, device)
    x = make_x(weights)
    still = {"x": [x], "weights": leaves(x, weights)[1:], "nothing": []}
    still |= {"blocks": [weights.blocks], "bias": [weights.bias]}
    for t in still[frozen]:
        t.requires_grad_(False)
    compare(x, weights, attention_grads(x, weights), **tolerance(device))
    for t in leaves(x, weights):
        t.requires_grad_(False)
    assert not any(y.requires_grad for y in butterfly_qkv(x, weights, HEADS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 5)])
def test_gradients_of_any_strides(device, shape):
    weights = make_weights(8, torch.float32, device)
    x = make_x(weights, shape)
    dys = attention_grads(x, weights)
    packed = torch.stack(dys, 3).permute(3, 0, 1, 2, 4)  # of one tensor, as q, k and v themselves
    for these in (dys, [dy.contiguous() for dy in dys], [dy.mT.contiguous().mT for dy in dys]):
        compare(x, weights, these, **tolerance(device))
    compare(x, weights, list(packed), **tolerance(device))
    compare(x, weights, [dys[0], dys[1].sum().expand(dys[1].shape), None], **tolerance(device))


def test_gradcheck():
    weights = make_weights(8)
    x = make_x(weights, (1, 3))
    blocks, layout, *factors = weights

    def function(x, blocks, *factors):
        return butterfly_qkv(x, Weights(blocks, layout, *factors), HEADS)

    assert torch.autograd.gradcheck(function, (x, blocks, *factors), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_autocast(device, stream):
    """float32 weights; their gradients are float32 and not rounded."""
    weights = make_weights(8, torch.float32, device)
    x = make_x(weights, dtype=stream)
    dys = attention_grads(x, weights)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = (run(f, x, weights, dys) for f in (butterfly_qkv, separate))
    assert [t.dtype for t in ours[:3]] == [torch.bfloat16] * 3
    assert [t.dtype for t in ours[3:]] == [stream, *[torch.float32] * 4]
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 8])
def test_no_copy_on_the_way_to_the_operator(device, rank):
    weights = make_weights(rank, torch.float32, device)
    x = make_x(weights)
    thirds = butterfly_qkv(x, weights, HEADS)
    dys = attention_grads(x, weights)
    with Seen() as seen:
        torch.autograd.grad(thirds, leaves(x, weights), dys)
    (args,) = seen.of(BACKWARD)
    assert [args[i].data_ptr() for i in (0, -2, -1)] == [dy.data_ptr() for dy in dys]
    assert len(thirds) == 3 and len({t.untyped_storage().data_ptr() for t in thirds}) == 1
    copies = {
        torch.ops.aten.cat.default,
        torch.ops.aten.stack.default,
        torch.ops.aten.clone.default,
    }
    assert not copies & {func for func, _ in seen.calls}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_whole_graphs(device, backend):
    """Of any number of tokens, and with attention between q, k, v and their gradients."""
    weights = make_weights(8, torch.float32, device)

    def attend(x, weights, heads):
        return (F.scaled_dot_product_attention(*butterfly_qkv(x, weights, heads)),)

    def alone(x, weights, heads):
        return butterfly_qkv(x, weights, heads)

    for function, reference in ((alone, separate), (attend, attend)):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for shape in ((2, 7), (2, 9), (3, 6)):
            x = make_x(weights, shape)
            got, want = compiled(x, weights, HEADS), reference(x, weights, HEADS)
            dys = [torch.randn_like(y) for y in want]
            inputs = leaves(x, weights)
            grads = [torch.autograd.grad(ys, inputs, dys) for ys in (got, want)]
            torch.testing.assert_close(got, want, **tolerance(device))
            torch.testing.assert_close(*grads, **tolerance(device))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_backward_hands_on_what_attention_gives(device):
    """Views of three tensors, that is, not one in which they were put side by side."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = make_weights(0, dtype, device)

    def attend(x, weights):
        return F.scaled_dot_product_attention(*butterfly_qkv(x, weights, HEADS))

    x = make_x(weights, (2, 64))
    compiled = torch.compile(attend, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = torch._inductor.utils.run_fw_bw_and_get_code(lambda: compiled(x, weights))
    (call,) = re.findall(r"pixelfly\.backward\.default\((.*)\)", "".join(codes))
    assert call.startswith("reinterpret_tensor(buf") and call.count("reinterpret_tensor(buf") == 3


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            blocks, self.layout, _, _, bias = make_weights(0, torch.float32)
            self.blocks, self.bias = torch.nn.Parameter(blocks), torch.nn.Parameter(bias)

        def forward(self, x):
            weights = Weights(self.blocks, self.layout, bias=self.bias)
            return F.scaled_dot_product_attention(*butterfly_qkv(x, weights, HEADS))

    module, x = Module(), torch.randn(2, 5, 64)
    exported = torch.export.export(module, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 8])
def test_opcheck(device, rank):
    weights = make_weights(rank, torch.float32, device)
    x = make_x(weights)
    blocks, layout, u, v, bias = weights
    plan, header = device_plan(layout, rank, x.device), plan_header(layout, rank, x.device)
    torch.library.opcheck(
        torch.ops.pixelfly.qkv.default, (x, blocks, u, v, bias, plan, header, False, HEADS)
    )
    rows, blocks, u, v = (None if t is None else t.detach() for t in (x[0], blocks, u, v))
    t = None if v is None else rows @ v.t()
    dys = [torch.randn(7, 64, device=device) for _ in range(3)]
    needs = (True, True, rank > 0, rank > 0, True)
    torch.library.opcheck(
        BACKWARD,
        (dys[0], rows, blocks, u, v, t, None, plan, header, False, False, False, *needs, None,
         False, *dys[1:]),
    )  # fmt: skip


def test_checkpoint():
    weights = make_weights(8)

    def function(x, weights, heads):
        return checkpoint(butterfly_qkv, x, weights, heads, use_reentrant=False)

    x = make_x(weights)
    compare(x, weights, attention_grads(x, weights), function)


def test_what_is_refused():
    weights = make_weights(8)
    x = make_x(weights)
    with pytest.raises(ValueError, match=r"x must be \[B, tokens, K\], got \[7, 64\]"):
        butterfly_qkv(x[0], weights, HEADS)
    for heads in (5, 0):
        with pytest.raises(ValueError, match=f"a third of out_features=192, got {heads}"):
            butterfly_qkv(x, weights, heads)
    with pytest.raises(ValueError, match="in_features=64, got 63"):
        butterfly_qkv(x[..., 1:], weights, HEADS)
    with pytest.raises(TypeError, match="x.dtype"):
        butterfly_qkv(x.float(), weights, HEADS)
    y = sum(t.square().sum() for t in butterfly_qkv(x, weights, HEADS))
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: butterfly_qkv(x, weights, HEADS)[0].sum())(x)
    with pytest.raises(RuntimeError, match="dy_k and dy_v must be given together"):
        header = plan_header(weights.layout, 0, x.device)
        plan = device_plan(weights.layout, 0, x.device)
        rows, dy = x[0].detach(), torch.zeros(7, 64, dtype=x.dtype)
        BACKWARD(
            dy, rows, weights.blocks, None, None, None, None, plan, header, False, False, False,
            True, False, False, False, False, None, False, dy,
        )  # fmt: skip


# Widths whose thirds the kernels take where they lie (whole tiles of 64) and others.
WIDTHS = {"tiles": 128, "ragged": 96, "half a block of 128": 64}


@pytest.mark.gpu
@pytest.mark.parametrize("width", list(WIDTHS))
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("rank", [0, 16, 136])
@pytest.mark.parametrize("path", ["auto", "sm80", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels(monkeypatch, width, block_size, rank, path, dtype):
    """What one gradient gives, bit for bit, from three."""
    if path == "split" and (block_size == 32 or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("product_split_sm90 serves blocks of 64 and 128 on Hopper")
    monkeypatch.setenv("PIXELFLY_KERNEL", path)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    weights = make_weights(rank, dtype, "cuda", block_size, WIDTHS[width])
    for shape in ((3, 197), (1, 300), (2, 100)):
        x = make_x(weights, shape)
        dys = attention_grads(x, weights)
        packed = list(torch.stack(dys, 3).permute(3, 0, 1, 2, 4))
        for these in (dys, packed, [dys[0], None, dys[2]]):
            compare(x, weights, these, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_copied_on_hopper(misaligned, dtype):
    """But what does not begin at 16 bytes."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("other GPUs join the thirds")
    weights = make_weights(16, dtype, "cuda", 64, 128)
    x = make_x(weights, (2, 200))
    thirds = butterfly_qkv(x, weights, HEADS)
    dys = attention_grads(x, weights)
    if misaligned:
        space = torch.randn(dys[1].numel() + 1, device="cuda").to(dtype)[1:]
        dys[1] = space.view(2, 200, HEADS, 64).transpose(1, 2)
    inputs = leaves(x, weights)
    want = torch.autograd.grad(separate(x, weights, HEADS), inputs, dys)
    torch.autograd.grad(thirds, inputs, dys, retain_graph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        got = torch.autograd.grad(thirds, inputs, dys)
        torch.cuda.synchronize()
    torch.testing.assert_close(got, want, **tolerance("cuda", dtype))
    kernels = [event.key for event in profile.key_averages()]
    ours = [name for name in kernels if "_sm90" in name or "_sm80" in name]
    copies = [name for name in kernels if re.search("copy|Copy|Memcpy|cat|Cat|elementwise", name)]
    assert ours and bool(copies) == (misaligned or dtype == torch.float32), kernels


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
def test_attention_on_a_gpu(compiled, rank):
    """Whatever strides torch's attention gives its gradients: no further off than without us."""
    weights = make_weights(rank, torch.float32, "cuda", 64, 128)
    x = make_x(weights, (4, 197))

    def step(function, autocast=True):
        context = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            y = F.scaled_dot_product_attention(*function(x, weights, HEADS))
        return [y.float(), *torch.autograd.grad(y.float().square().sum(), leaves(x, weights))]

    def attend(x, weights, heads):
        return butterfly_qkv(x, weights, heads)

    ours = torch.compile(attend, fullgraph=True) if compiled else attend
    exact = step(separate, autocast=False)
    for got, theirs, want in zip(step(ours), step(separate), exact, strict=True):
        assert (got - want).norm() <= 2 * (theirs - want).norm() + 1e-3 * want.norm()


@pytest.mark.gpu
def test_cuda_graph():
    weights = make_weights(16, torch.bfloat16, "cuda", 64, 128)
    x = make_x(weights, (2, 200))
    dys = attention_grads(x, weights)
    inputs = leaves(x, weights)

    def step():
        return torch.autograd.grad(butterfly_qkv(x, weights, HEADS), inputs, dys)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    for dy in dys:
        dy.normal_()
    graph.replay()
    torch.testing.assert_close(list(grads), list(step()))
