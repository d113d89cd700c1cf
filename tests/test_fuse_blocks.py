"""Fused residual blocks of timm's models: the same function, and back again."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import vision_ops  # noqa: F401 (before timm and transformers)
from torch import nn
from torch.utils.checkpoint import checkpoint

import pixelfly.nn.attention
from pixelfly import PixelflyConfig, PixelflyLinear, densify_, sparsify_
from pixelfly.nn import TokenMLP
from pixelfly.nn.attention import FullSelfAttention
from pixelfly.nn.blocks import FusedMixerBlock, FusedTransformerBlock
from pixelfly.nn.patches import PatchConv2d
from pixelfly.ops import butterfly_qkv
from pixelfly.ops.device import has_hopper_kernels

timm = pytest.importorskip("timm")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = PixelflyConfig(density=0.5, block_size=16, rank=0, fuse_mlp=True, fuse_blocks=True)
PLAIN = PixelflyConfig(density=0.5, block_size=16, rank=0)


def vit(width=64, **options):
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=2, num_classes=8, **options
    )


def mixer():
    return timm.models.MlpMixer(
        img_size=32, patch_size=8, embed_dim=64, num_blocks=2, num_classes=8
    )


BUILDS = {
    "vit": (vit, "vit", FusedTransformerBlock),
    "vit with heads of 64": (lambda: vit(128), "vit", FusedTransformerBlock),
    "vit with scales": (lambda: vit(init_values=0.5, qk_norm=True), "vit", FusedTransformerBlock),
    "mixer": (mixer, "mixer", FusedMixerBlock),
}


def run(model, x):
    """Logits, the gradient of x and those of the parameters, by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def pair(name, device="cpu"):
    build, preset, kind = BUILDS[name]
    fused = build().to(device)
    nn.init.normal_(fused.head.weight, std=0.1)  # timm's starts at zero
    plain = copy.deepcopy(fused)
    report = sparsify_(fused, FUSED, preset)
    sparsify_(plain, PLAIN, preset)
    plain.load_state_dict(fused.state_dict())
    patches = "stem.proj" if name == "mixer" else "patch_embed.proj"
    assert report.fused_blocks == ["blocks.0", "blocks.1", patches] and not report.notes
    assert all(type(block) is kind for block in fused.blocks)
    return fused, plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(BUILDS))
def test_same_function(name, device):
    fused, plain = pair(name, device)
    x = torch.randn(3, 3, 32, 32, device=device)
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(run(fused, x), run(plain, x), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(BUILDS))
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(name, device, compiled):
    """No further from float32 than the blocks as they come."""
    if compiled and device == "cpu":
        pytest.skip("inductor on the CPU takes a C++ compiler and minutes")
    torch._dynamo.reset()
    fused, plain = pair(name, device)
    x = torch.randn(3, 3, 32, 32, device=device)
    exact = run(plain, x)
    with torch.autocast(device, torch.bfloat16):
        ours = run(torch.compile(fused, fullgraph=True) if compiled else fused, x)
        theirs = run(plain, x)
    for key in exact:
        mine = ours[f"_orig_mod.{key}" if compiled and key not in ("x", "y") else key]
        # Some gradients are nothing but rounding (a bias of keys changes no attention).
        bound = 2 * (theirs[key] - exact[key]).norm() + 0.01 * exact[key].norm() + 1e-3
        assert (mine - exact[key]).norm() <= bound, key


@pytest.mark.parametrize("name", list(BUILDS))
def test_whole_graph(name):
    torch._dynamo.reset()
    fused, _ = pair(name)
    x = torch.randn(3, 3, 32, 32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-5)


def test_parts_of_a_block():
    fused, _ = pair("vit")
    assert type(fused.blocks[0].attn) is FullSelfAttention
    fused, _ = pair("mixer")
    assert type(fused.blocks[0].mlp_tokens) is TokenMLP
    assert fused.blocks[0].mlp_tokens.activation == "gelu"


@pytest.mark.parametrize("name", list(BUILDS))
def test_densify_gives_the_blocks_back(name):
    fused, _ = pair(name)
    fused = copy.deepcopy(fused)
    x = torch.randn(2, 3, 32, 32)
    before = fused(x)
    densify_(fused)
    assert not [m for m in fused.modules() if type(m).__module__.startswith("pixelfly.nn")]
    assert {type(block).__name__ for block in fused.blocks} <= {"Block", "MixerBlock"}
    torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (35, 41)])
def test_patches_as_a_matrix_product(size):
    conv = nn.Conv2d(3, 16, kernel_size=(8, 4), stride=(8, 4), dtype=torch.float64)
    patches = PatchConv2d.from_conv(conv)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y, want = patches(x), conv(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(patches(x[0]), conv(x[0]))
    assert y.flatten(2).mT.is_contiguous()  # the tokens, which timm takes out like that
    inputs = (x, conv.weight, conv.bias)
    dy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)
    )
    back = patches.to_conv()
    assert type(back) is nn.Conv2d and back.weight is conv.weight and back.bias is conv.bias


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 4}, "kernel_size must be stride"),
        ({"stride": 8, "padding": 1}, "padding must be 0"),
        ({"stride": 8, "groups": 2}, "groups must be 1"),
    ],
)
def test_convolutions_over_other_patches(options, message):
    conv = nn.Conv2d(4, 16, kernel_size=8, **options)
    with pytest.raises(ValueError, match=message):
        PatchConv2d.from_conv(conv)
    model = vit(in_chans=4)
    model.patch_embed.proj = conv
    report = sparsify_(model, FUSED, "vit")
    assert model.patch_embed.proj is conv and report.fused_blocks == ["blocks.0", "blocks.1"]


def _attention(gate=None, low_rank=0):
    attention = FullSelfAttention.from_module(vit(qkv_bias=True).blocks[0].attn)
    attention.qkv = PixelflyLinear(64, 192, block_size=16, rank=low_rank, gate=gate)
    return attention


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("build", "spoil", "split"),
    [
        (_attention, lambda layer: None, True),
        (lambda: _attention("scalar", 16), lambda layer: None, True),
        (lambda: _attention("token", 16), lambda layer: None, False),
        (_attention, lambda layer: layer.requires_grad_(False), True),
        (_attention, lambda layer: layer.bias.requires_grad_(False), True),
        (_attention, lambda layer: layer.register_forward_hook(lambda *_: None), False),
        (_attention, lambda layer: layer.register_full_backward_hook(lambda *_: None), False),
        (_attention, lambda layer: setattr(layer, "forward", layer.forward), False),
    ],
)
def test_qkv_layer_takes_three_gradients(monkeypatch, build, spoil, split, checkpointed):
    """Or, where its call does more than its weights say, is called and gets one."""
    attention = build()
    spoil(attention.qkv)
    calls = []

    def counted(*args):
        calls.append(args)
        return butterfly_qkv(*args)

    def step():
        y = torch.linspace(-1, 1, 2 * 9 * 64).view(2, 9, 64).requires_grad_()
        out = checkpoint(attention, y, use_reentrant=False) if checkpointed else attention(y)
        attention.zero_grad()
        out.square().sum().backward()
        return [out, y.grad, *(p.grad for p in attention.parameters() if p.requires_grad)]

    monkeypatch.setattr(pixelfly.nn.attention, "butterfly_qkv", counted)
    ours = step()
    assert len(calls) == split * (1 + checkpointed)
    monkeypatch.setattr(pixelfly.nn.attention, "is_plain", lambda layer: False)
    torch.testing.assert_close(ours, step(), rtol=1e-4, atol=1e-5)


def hopper_or_skip():
    if not has_hopper_kernels(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the kernels are for Hopper GPUs")


PACKED = {"plain": True, "dense qkv": True, "frozen": True, "normed y": True, "long": False}
PACKED |= {"norms": False, "hooked norm": False, "mask": False, "causal": False, "narrow": False}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", list(PACKED))
@pytest.mark.parametrize("compiled", [False, True])
def test_short_sequences_stay_packed(monkeypatch, device, case, compiled):
    """Where the kernels serve them (here the CPU passes for Hopper); the function is the same."""
    torch._dynamo.reset()
    if device == "cuda":
        hopper_or_skip()
    else:
        module = importlib.import_module("pixelfly.ops.short_attention")
        monkeypatch.setattr(module, "has_hopper_kernels", lambda device: True)
    options = {"norms": {"qk_norm": True}, "normed y": {"scale_attn_norm": True}}.get(case, {})
    model = vit(64 if case == "narrow" else 128, qkv_bias=True, **options)
    attention = FullSelfAttention.from_module(model.blocks[0].attn)
    if case != "dense qkv":
        attention.qkv = PixelflyLinear(attention.qkv.in_features, attention.qkv.out_features,
                                       block_size=16, rank=16)  # fmt: skip
    if case == "frozen":
        attention.qkv.requires_grad_(False)
    if case == "hooked norm":
        attention.k_norm.register_forward_hook(lambda module, args, k: 2 * k)
    attention.to(device)
    tokens = 209 if case == "long" else 50
    x = torch.randn(2, tokens, attention.qkv.in_features, device=device)
    mask = torch.rand(2, 1, tokens, tokens, device=device) > 0.3
    call = {"mask": {"attn_mask": mask}, "causal": {"is_causal": True}}.get(case, {})
    backend = "inductor" if device == "cuda" else "aot_eager"
    function = torch.compile(attention, fullgraph=True, backend=backend) if compiled else attention

    def step(function, dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            y = function(leaf, **call)
        attention.zero_grad()
        y.float().square().sum().backward()
        return [y, leaf.grad, *(p.grad for p in attention.parameters() if p.requires_grad)]

    calls = []
    packed = pixelfly.nn.attention.short_attention
    count = lambda *args, **options: calls.append(args) or packed(*args, **options)  # noqa: E731
    monkeypatch.setattr(pixelfly.nn.attention, "short_attention", count)
    ours, exact = step(function), step(attention, torch.float32)
    assert len(calls) == PACKED[case]
    monkeypatch.setattr(pixelfly.nn.attention, "serves", lambda *args: False)
    theirs = step(attention)
    assert len(calls) == PACKED[case] and [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, other, want in zip(ours, theirs, exact, strict=True):
        bound = 2 * (other - want).norm() + 0.01 * want.norm() + 1e-3
        assert (mine - want).norm() <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_of_a_vit(width):
    """short_attention serves heads of 64 features, torch's attention those of 32."""
    hopper_or_skip()
    model = vit(width).cuda()
    assert sparsify_(model, FUSED, "vit").fused_blocks
    x = torch.randn(3, 3, 32, 32, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            return run(model, x)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e.count for e in profile.key_averages() if "short_attention" in e.key]
    assert sum(kernels) == (0 if width == 64 else 2 * 2)  # forward and backward of two blocks


def test_masks_reach_the_attention():
    fused, plain = pair("vit")
    y = torch.randn(2, 17, 64)
    mask = torch.rand(2, 1, 17, 17) > 0.3
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(
            fused.blocks[0](y, **options), plain.blocks[0](y, **options), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: b.register_forward_hook(lambda *_: None), "block not fused: it has hooks"),
        (lambda b: b.mlp_tokens.fc1.register_forward_hook(lambda *_: None), "a layer of its"),
        (lambda b: setattr(b.mlp_tokens, "act", nn.Tanh()), "the activation Tanh of its"),
        (lambda b: setattr(b.mlp_tokens, "drop1", nn.Dropout(0.1)), "has dropout or a norm"),
        (lambda b: setattr(b, "mlp_tokens", nn.Identity()), "is a Identity, not timm's Mlp"),
    ],
)
def test_what_is_left(spoil, reason):
    model = mixer()
    spoil(model.blocks[0])
    report = sparsify_(model, FUSED, "mixer")
    assert report.fused_blocks == ["blocks.1", "stem.proj"]
    assert len(report.notes) == 1 and reason in report.notes[0]


def test_sparse_token_mlps_are_left():
    model = timm.models.MlpMixer(img_size=64, patch_size=8, embed_dim=64, num_blocks=1)
    assert sparsify_(model, PLAIN, lambda m, n: "mlp_tokens" in n).layers
    report = sparsify_(model, FUSED, "mixer")
    assert not report.fused_blocks and "is a PixelflyMLP, not timm's" in report.notes[0]


def test_no_known_block():
    report = sparsify_(nn.Sequential(nn.Linear(64, 64)), FUSED)
    assert "the model has no Block and no MixerBlock of timm" in str(report)


def test_norms_of_other_kinds_are_called():
    """A norm that is no plain LayerNorm does what it does."""
    model = vit()
    for block in model.blocks:
        block.norm1 = nn.Identity()
        block.norm2.register_forward_hook(lambda module, args, y: 2 * y)
    plain = copy.deepcopy(model)
    sparsify_(model, FUSED, lambda m, n: False)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
