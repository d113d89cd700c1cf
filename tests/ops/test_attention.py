"""butterfly_attention against the masked softmax over all scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from pixelfly.masks import AttentionLayout, butterfly_attention_layout
from pixelfly.nn import AttentionConfig, PixelflySelfAttention
from pixelfly.ops import attention, block_mask, butterfly_attention, butterfly_attention_reference
from pixelfly.ops.block_mask import make_block_mask
from pixelfly.ops.plan import named_constants

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(layout, *, batch=2, heads=3, features=8, dtype=torch.float64, device="cpu"):
    def normal(length: int, width: int) -> torch.Tensor:
        t = torch.randn(batch, heads, length, width, dtype=dtype, device=device)
        return t.requires_grad_()

    return normal(layout.q_len, features), *(
        normal(layout.kv_len, width) for width in (features, features + 4 * (device == "cpu"))
    )


def random_layout(q_len, kv_len, block_size, heads=1, density=0.4) -> AttentionLayout:
    shape = (heads, -(-q_len // block_size), -(-kv_len // block_size))
    return AttentionLayout.from_grid(torch.rand(shape) < density, block_size, q_len, kv_len)


def check(layout, *, is_causal=False, padding=False, tolerance=1e-10, **kwargs):
    q, k, v = inputs(layout, **kwargs)
    mask = None
    if padding:
        mask = torch.rand(q.shape[0], layout.kv_len, device=q.device) < 0.3
        mask[0] = True  # a sample that is all padding
    options = {"is_causal": is_causal, "key_padding_mask": mask}
    ours = butterfly_attention(q, k, v, layout, **options)
    exact = butterfly_attention_reference(q, k, v, layout, **options)
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(exact, (q, k, v), dy),
        strict=True,
    ):  # fmt: skip
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [48, 71])
@pytest.mark.parametrize("heads", [1, 3])
def test_cpu(length, heads, is_causal, padding):
    check(random_layout(length, length, 16, heads), is_causal=is_causal, padding=padding)


def test_cpu_rectangular_and_named_layouts():
    check(random_layout(40, 90, 16), padding=True)
    check(butterfly_attention_layout(100, block_size=16))
    check(butterfly_attention_layout(100, block_size=16, causal=True), is_causal=True)


def test_queries_without_keys_get_zeros():
    layout = AttentionLayout.from_grid(torch.tensor([[True, False], [False, False]]), 16)
    q, k, v = inputs(layout)
    y = butterfly_attention(q, k, v, layout)
    assert (y[:, :, 16:] == 0).all() and (y[:, :, :16] != 0).any()
    y.sum().backward()
    assert (q.grad[:, :, 16:] == 0).all() and (k.grad[:, :, 16:] == 0).all()


def test_full_layout_is_ordinary_attention():
    layout = AttentionLayout.from_grid(torch.ones(5, 5, dtype=torch.bool), 16, 75, 75)
    q, k, v = inputs(layout, dtype=torch.float32)
    for causal in (False, True):
        torch.testing.assert_close(
            butterfly_attention(q, k, v, layout, is_causal=causal),
            F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        )


def test_half_precision_sums_in_fp32():
    layout = butterfly_attention_layout(96, block_size=16)
    q, k, v = inputs(layout, dtype=torch.bfloat16)
    y = butterfly_attention(q, k, v, layout)
    exact = butterfly_attention_reference(*(t.double() for t in (q, k, v)), layout)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 2e-2


def test_gradcheck_and_compile():
    layout = random_layout(20, 35, 16)
    q, k, v = inputs(layout, batch=1, heads=2, features=4)
    assert torch.autograd.gradcheck(lambda *t: butterfly_attention(*t, layout), (q, k, v))
    compiled = torch.compile(butterfly_attention, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, k, v, layout), butterfly_attention_reference(q, k, v, layout)
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_block_mask_is_the_layout(is_causal, heads):
    """What FlexAttention is given on CUDA: counts and indices of partial and full blocks."""
    layout = random_layout(250, 250, 64, heads)
    mask = make_block_mask(layout, "cpu", is_causal)
    layout = layout.causal() if is_causal else layout
    found = torch.zeros_like(layout.grid)
    for counts, indices, full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for h in range(heads):
            for row in range(layout.grid.shape[1]):
                for col in indices[0, h, row, : counts[0, h, row]].tolist():
                    assert not found[h, row, col]
                    assert full != (is_causal and row == col)
                    found[h, row, col] = True
    assert torch.equal(found, layout.grid)
    assert mask.seq_lengths == (250, 250)


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """Attention as on CUDA, as far as tracing goes: torch refuses FlexAttention's gradients on the
    CPU, and its stand-in for the kernels drops no block. Yields the calls that made a mask."""
    made = []

    def make(*args):
        made.append(args)
        return make_block_mask(*args)

    values, name_of = named_constants("mask", lambda key: make(*key))
    monkeypatch.setattr(block_mask, "_made", values)
    monkeypatch.setattr(block_mask, "_mask_name", name_of)
    monkeypatch.setattr(attention, "_gathered", attention._flex)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_are_constants_of_compiled_programs(flex_on_the_cpu, is_causal):
    layer = PixelflySelfAttention(32, 2, attention=AttentionConfig(64), is_causal=is_causal)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(2):
        for length in (100, 150):
            hidden = torch.rand(2, length) < 0.3
            for mask in (None, ~hidden, hidden):
                x = torch.randn(2, length, 32, requires_grad=True)
                compiled(x, mask).square().sum().backward()
                assert x.grad.isfinite().all()
    # Of each length a program and a mask with padding, and one of both without.
    assert counter.frame_count == len(flex_on_the_cpu) == 4
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    assert sum(node.target is torch.ops.higher_order.flex_attention for node in nodes) == 4
    assert not any("sort" in str(node.target) for node in nodes)


def test_equal_layouts_share_masks_and_programs(flex_on_the_cpu):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(butterfly_attention, backend=counter, fullgraph=True)
    q, k, v = torch.randn(3, 1, 2, 150, 16)
    for stride in (1, 1, 2, 2):  # equal ones are other objects
        layout = butterfly_attention_layout(150, block_size=64, max_stride=stride, global_blocks=0)
        compiled(q, k, v, layout, is_causal=True)
    assert counter.frame_count == len(flex_on_the_cpu) == 2


def test_a_mask_made_in_inference_mode_serves_training(flex_on_the_cpu):
    layout = butterfly_attention_layout(100, block_size=64)
    with torch.inference_mode():
        mask = block_mask.block_mask_of(layout, torch.device("cpu"), False)
    assert block_mask.block_mask_of(layout, torch.device("cpu"), False) is mask
    assert not mask.kv_indices.is_inference() and len(flex_on_the_cpu) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "butterfly"}, TypeError, "layout must be an AttentionLayout"),
        ({"q": torch.zeros(2, 3, 40, 8)}, ValueError, "layout.q_len=48, got 40"),
        ({"q": torch.zeros(3, 48, 8)}, ValueError, r"q must be \[B, H"),
        ({"k": torch.zeros(2, 3, 48, 16)}, ValueError, "k.shape must be"),
        ({"v": torch.zeros(2, 1, 48, 8)}, ValueError, "v.shape must begin with"),
        ({"k": torch.zeros(2, 3, 48, 8).double()}, ValueError, "q's dtype"),
        ({"q": torch.zeros(2, 3, 48, 8).long()}, TypeError, "floating-point"),
        ({"key_padding_mask": torch.zeros(2, 48)}, TypeError, "must be bool"),
        ({"key_padding_mask": torch.zeros(2, 3) > 0}, ValueError, "key_padding_mask.shape"),
        ({"layout": random_layout(48, 48, 16, heads=2)}, ValueError, "layout.heads must be 1 or"),
        ({"layout": random_layout(48, 80, 16), "k": torch.zeros(2, 3, 80, 8),
          "v": torch.zeros(2, 3, 80, 8), "is_causal": True}, ValueError, "q_len == kv_len"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    call = {name: torch.zeros(2, 3, 48, 8) for name in "qkv"}
    call["layout"] = random_layout(48, 48, 16)
    with pytest.raises(error, match=message):
        butterfly_attention(**(call | change))
