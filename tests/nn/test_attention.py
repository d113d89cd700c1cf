"""PixelflySelfAttention against the modules that it replaces, and their formula."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import vision_ops  # noqa: F401 (before timm and transformers)
from torch import nn

from pixelfly.nn import AttentionConfig, PixelflyLinear, PixelflySelfAttention
from pixelfly.ops import butterfly_attention_reference

FULL = AttentionConfig(block_size=128)  # one block: every score of a short sequence
FINE = AttentionConfig(block_size=16)


def timm_attention(**options) -> nn.Module:
    module = pytest.importorskip("timm.models.vision_transformer").Attention
    return module(64, num_heads=4, qkv_bias=True, **options).double()


def gpt2(positions=96, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | options
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=positions, vocab_size=32, **settings
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def convert(model: nn.Module, attention: AttentionConfig) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.attn = PixelflySelfAttention.from_module(block.attn, attention)
    return model


@pytest.mark.parametrize("length", [48, 71, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_formula(length, causal):
    layer = PixelflySelfAttention(64, 4, attention=FINE, is_causal=causal).double()
    x = torch.randn(2, length, 64, dtype=torch.float64)
    qkv = layer.qkv(x).reshape(2, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
    y = butterfly_attention_reference(*qkv, FINE.layout(length), is_causal=causal)
    expected = layer.proj(y.transpose(1, 2).reshape(2, length, 64))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("extra", ["plain", "norms", "gated"])
def test_timm(extra):
    options = {
        "plain": {},
        "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        "gated": {"gated": True},
    }[extra]
    try:
        dense = timm_attention(**options)
    except TypeError:
        pytest.skip("this timm has no such option")
    ours = PixelflySelfAttention.from_module(copy.deepcopy(dense), FULL)
    assert list(ours.state_dict()) == list(dense.state_dict()) or set(ours.state_dict()) == set(
        dense.state_dict()
    )
    x = torch.randn(2, 50, 64, dtype=torch.float64)
    mask = torch.rand(2, 50) < 0.7
    torch.testing.assert_close(ours(x), dense(x))
    torch.testing.assert_close(
        ours(x, attn_mask=mask), dense(x, attn_mask=mask[:, None, None].expand(2, 1, 50, 50))
    )
    torch.testing.assert_close(ours(x, is_causal=True), dense(x, is_causal=True))
    back = ours.to_dense()
    assert type(back) is type(dense)
    torch.testing.assert_close(back(x), dense(x))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gpt2(padded, implementation):
    dense = gpt2(attn_implementation=implementation)
    ours = convert(dense, FULL)
    assert ours.state_dict().keys() == dense.state_dict().keys()
    ids = torch.randint(0, 32, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[0, :7], mask[1, 33:] = 0, 0
    a = ours(ids, attention_mask=mask if padded else None).logits
    b = dense(ids, attention_mask=mask if padded else None).logits
    torch.testing.assert_close(a[mask > 0], b[mask > 0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # before and from transformers 5.24
def test_gpt2_takes_the_cache_under_either_name(name):
    layer = convert(gpt2(), FINE).transformer.h[0].attn
    cache = pytest.importorskip("transformers").DynamicCache()
    x = torch.randn(2, 50, 64, dtype=torch.float64)
    halves = x[:, :37].contiguous(), x[:, 37:].contiguous()
    parts = [layer(half, **{name: cache})[0] for half in halves]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x)[0])


def test_gpt2_decodes_what_a_whole_pass_sees():
    model = convert(gpt2(), FINE)
    ids = torch.randint(0, 32, (2, 50))
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :37], use_cache=True)
    cache, parts = first.past_key_values, [first.logits]
    for begin, end in ((37, 38), (38, 44), (44, 50)):
        parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    a, b = (
        model.generate(
            ids, max_new_tokens=20, do_sample=False, use_cache=c, pad_token_id=0,
            eos_token_id=None,
        )
        for c in (False, True)
    )  # fmt: skip
    assert torch.equal(a, b)


def test_gpt2_scales_by_layer():
    dense = gpt2(scale_attn_by_inverse_layer_idx=True)
    ids = torch.randint(0, 32, (1, 20))
    torch.testing.assert_close(convert(dense, FULL)(ids).logits, dense(ids).logits)


def test_dropout_after_the_projection_acts_in_training_alone():
    layer = PixelflySelfAttention.from_module(timm_attention(proj_drop=0.5), FULL)
    x = torch.randn(1, 9, 64, dtype=torch.float64)
    assert (layer.train()(x) == 0).any()
    assert not (layer.eval()(x) == 0).any()


def test_pixelfly_projections_train_at_every_length():
    sparse = functools.partial(PixelflyLinear, density=0.5, block_size=16)
    layer = PixelflySelfAttention(64, 2, attention=FINE, linear=sparse)
    for length in (33, 16, 100):
        layer(torch.randn(2, length, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert copy.deepcopy(layer).state_dict().keys() == layer.state_dict().keys()


def test_compiles_whole():
    layer = PixelflySelfAttention(64, 2, attention=FINE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (40, 55):  # dynamic from the second on
        x = torch.randn(2, length, 64)
        torch.testing.assert_close(compiled(x), layer(x))


def test_what_one_mode_makes_of_a_layout_serves_every_other():
    layer = PixelflySelfAttention(64, 2, attention=FINE)
    x, y = torch.randn(2, 87, 64), torch.randn(2, 103, 64)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    exported = torch.export.export(layer, (y,), strict=False).module()
    torch.testing.assert_close(exported(y), layer(y))


def test_layouts_are_made_once():
    assert FINE.layout(100) is FINE.layout(100)
    assert AttentionConfig(16, max_stride=64).layout(40).grid.shape == (1, 3, 3)


def test_bad_input():
    layer = PixelflySelfAttention(64, 4, attention=FINE)
    x = torch.randn(2, 20, 64)
    with pytest.raises(ValueError, match="num_heads must divide features=64, got 5"):
        PixelflySelfAttention(64, 5)
    with pytest.raises(ValueError, match=r"x must be \[B, N, C\]"):
        layer(x[0])
    with pytest.raises(ValueError, match="may only say which keys take part"):
        layer(x, attn_mask=torch.ones(20, 20, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask must be bool"):
        layer(x, attn_mask=torch.zeros(2, 20))
    with pytest.raises(TypeError, match="module must be timm's Attention"):
        PixelflySelfAttention.from_module(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="dropout of attention weights is 0.1, not 0"):
        PixelflySelfAttention.from_module(timm_attention(attn_drop=0.1))
    with pytest.raises(ValueError, match="was not made from another module"):
        layer.to_dense()
    for change, message in (
        ({"block_size": 48}, "block_size must be one of"),
        ({"max_stride": 3}, "max_stride must be a power of two"),
        ({"global_blocks": -1}, "global_blocks must be a non-negative int"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionConfig(**change)


def test_bad_input_gpt2():
    model = convert(gpt2(), FINE)
    attention = model.transformer.h[0].attn
    x = torch.randn(1, 20, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="attention weights, which"):
        attention(x, output_attentions=True)
    with pytest.raises(ValueError, match="cross-attention is not supported"):
        attention(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="attention_mask.shape must be"):
        attention(x, attention_mask=torch.ones(1, 7))
    window = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril().triu(-3)
    with pytest.raises(ValueError, match="causal masking and padding alone"):
        attention(x, attention_mask=window)
    bias = torch.randn(1, 1, 20, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="causal masking and padding alone"):
        attention(x, attention_mask=bias)
    static = pytest.importorskip("transformers").StaticCache(model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="must grow by what it is given"):
        attention(x, past_key_values=static)
