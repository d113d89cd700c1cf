"""What is counted: MACs, and the bytes that every operator of forward and backward moves."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy_models import Block

from pixelfly import PixelflyLinear
from pixelfly.budget import Work, count
from pixelfly.budget.count import Tally, beside_matmuls
from pixelfly.budget.operators import norm_work
from pixelfly.budget.rate import add
from pixelfly.masks import AttentionLayout
from pixelfly.nn import AttentionConfig, PixelflySelfAttention
from pixelfly.nn.attention import FullSelfAttention
from pixelfly.ops import butterfly_attention, butterfly_lowrank_mm


def test_macs_are_the_flop_counters():
    model, x = Block(), torch.randn(2, 16, 256)
    tallies = count(model, x)
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(x.to("meta"))
    assert 2 * sum(t.macs for t in tallies.values()) == counter.get_total_flops()
    assert tallies["attn.qkv"].macs == 32 * 256 * 768
    assert tallies[""].macs == 2 * 2 * 16 * 16 * 256  # the attention itself


def test_bytes_of_a_matmul_are_its_tensors():
    tally = count(nn.Linear(64, 32, bias=False), torch.zeros(8, 64))[""]
    macs = 8 * 64 * 32
    assert tally == Tally(macs, {"dense": Work(2 * macs, 4 * (8 * 64 + 64 * 32 + 8 * 32))})


def test_embedding_reads_what_it_looks_up():
    tally = count(nn.Embedding(1000, 16), torch.zeros(8, dtype=torch.long))[""]
    assert tally.macs == 0
    assert tally.works["pointwise"].bytes < 1000 * 16 * 4


BF16, F32 = 2, 4  # bytes


def total(tallies: dict[str, Tally]) -> dict[str, Work]:
    works: dict[str, Work] = {}
    for tally in tallies.values():
        add(works, tally.works)
    return works


def test_backward_sums_the_bias_gradient():
    x = torch.zeros(64, 128)
    step = total(count(nn.Linear(128, 256), x, training=True, dtype=torch.bfloat16))
    assert step["reduction"] == Work(0, BF16 * (64 * 256 + 256))
    assert "pointwise" not in step
    assert step["dense"] == total(count(nn.Linear(128, 256), x, dtype=torch.bfloat16))["dense"]
    assert beside_matmuls(128, 256, 64, True, torch.bfloat16, None, True).keys() == {"reduction"}


def test_autocast_casts_weight_and_gradient():
    step = beside_matmuls(128, 256, 64, False, torch.float32, torch.bfloat16, True)
    assert step == {"mixed": Work(0, 2 * (F32 + BF16) * 128 * 256, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_layer_norm_is_three_passes(training, dtype):
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)), torch.zeros(8, 64)
    work = total(count(model, x, training=training, dtype=dtype))["normalization"]
    expected = norm_work(8 * 64, dtype.itemsize, training)  # what is timed is what is counted
    assert (work.flops, work.count) == (expected.flops, expected.count)
    edge = 2 * 64 + 2 * 8 + training * 64  # scale and shift; statistics of rows; dscale
    assert work.bytes == expected.bytes + edge * dtype.itemsize


def test_a_frozen_scale_has_no_pass_of_its_own():
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)), torch.zeros(8, 64)
    model[1].requires_grad_(False)
    real = total(count(model, x, training=True, fake=False))["normalization"]
    assert (real.flops, real.count) == (2 * 8 * 64, 2)


class Function(nn.Module):
    """A parameter p [4, 64] and a function of x and p."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.zeros(4, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.p)


@pytest.mark.parametrize(
    ("function", "kind", "elements"),
    [
        (lambda x, p: x.transpose(1, 2).contiguous(), "strided", 2 * 8 * 4 * 64),
        (lambda x, p: x * p, "pointwise", 2 * 8 * 4 * 64 + 4 * 64),
        (lambda x, p: x.double(), "mixed", 3 * 8 * 4 * 64),
        (lambda x, p: x.sum((0, 1)), "reduction", 8 * 4 * 64 + 64),
        (lambda x, p: x.sum(-1), "pointwise", 8 * 4 * 64 + 8 * 4),
        (lambda x, p: torch.zeros_like(x), "pointwise", 8 * 4 * 64),
        (lambda x, p: torch.cat([x.mT, x.mT]), "strided", 4 * 8 * 4 * 64),
        (lambda x, p: F.dropout(x, 0.5), "pointwise", 2 * 8 * 4 * 64 + 8 * 64),  # a byte a mask
    ],
)
def test_what_an_operator_moves(function, kind, elements):
    works = total(count(Function(function), torch.zeros(8, 4, 64)))
    assert works == {kind: Work(0, F32 * elements)}


@pytest.mark.parametrize("power", [lambda x, p: x**3, lambda x, p: torch.pow(x, 3)])
def test_autocast_runs_in_float32_what_it_does_on_cuda(power):
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    works = total(count(Function(power), x, autocast=torch.bfloat16))
    # a cast, then the power
    assert works == {"mixed": Work(0, (BF16 + F32) * 512), "pointwise": Work(0, 2 * F32 * 512)}
    (plain,) = total(count(Function(power), x)).values()
    assert plain == Work(0, 2 * BF16 * 512)


def test_a_region_without_autocast_runs_as_it_is():
    def power(x, p):
        with torch.autocast(x.device.type, enabled=False):
            return torch.pow(x, 3)

    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    (work,) = total(count(Function(power), x, autocast=torch.bfloat16)).values()
    assert work == Work(0, 2 * BF16 * 512)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_has_a_rate_of_its_own(causal):
    def attend(x, p):
        q = x.view(2, 32, 4, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=causal)

    tally = count(Function(attend), torch.zeros(2, 32, 64))[""]
    assert tally.macs == 2 * 2 * 4 * 32 * 32 * 16
    flops = tally.macs if causal else 2 * tally.macs  # kernels skip the upper half
    assert tally.works == {"attention": Work(flops, F32 * 4 * 2 * 32 * 64)}


# Rows keep 16 + 8, 16 and 16 + 16 + 8 of 40 keys, in rows of 16, 16 and 8 queries.
GRID = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()
LAYOUT = AttentionLayout.from_grid(GRID, 16, 40, 40)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_a_layout_is_its_kept_blocks(causal, training, per_head):
    empty = AttentionLayout.from_grid(torch.zeros_like(GRID), 16, 40, 40)
    layout = AttentionLayout.per_head([LAYOUT, empty, LAYOUT, empty]) if per_head else LAYOUT

    def attend(x, p):
        q = (x * p[0]).view(2, 40, 4, 16).transpose(1, 2)
        padding = torch.zeros(2, 40, dtype=torch.bool, device=x.device)
        options = {"is_causal": causal, "key_padding_mask": padding}
        y = butterfly_attention(q, q, q[..., :8], layout, **options)
        assert y.shape == (2, 4, 40, 8)
        return y

    tally = count(Function(attend), torch.zeros(2, 40, 64), training=training)[""]
    scores = 16 * (16 if causal else 16 + 8) + 16 * 16 + 8 * 40
    assert tally.macs == 2 * (2 if per_head else 4) * scores * (16 + 8)
    moved = F32 * 2 * 40 * 4 * (16 + 16 + 8 + 8)
    assert tally.works["attention"] == Work(2 * tally.macs, moved)
    assert not tally.works.keys() & {"dense", "unaligned"}


def self_attention(kind=PixelflySelfAttention, block_size: int = 16, **options) -> nn.Module:
    return kind(64, 4, attention=AttentionConfig(block_size=block_size), **options)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}])
def test_a_layout_of_all_blocks_counts_as_dense_attention(options):
    x = torch.zeros(2, 48, 64)
    whole = count(self_attention(block_size=128), x, training=True, **options)
    assert whole == count(self_attention(FullSelfAttention), x, training=True, **options)
    assert whole[""].macs == 2 * 2 * 48 * 48 * 64


def test_packed_attention_counts_as_torchs(monkeypatch):
    """As Hopper GPUs run it, for which the CPU passes here."""
    model = FullSelfAttention(128, 2).bfloat16()
    x = torch.zeros(2, 48, 128, dtype=torch.bfloat16)
    plain = count(model, x, training=True, fake=False)[""]
    module = importlib.import_module("pixelfly.ops.short_attention")
    monkeypatch.setattr(module, "has_hopper_kernels", lambda device: True)
    packed = count(model, x, training=True, fake=False)[""]
    assert packed.macs == plain.macs == 2 * 2 * 48 * 48 * 128
    assert packed.works["attention"] == plain.works["attention"]
    # The gradients of q, k and v need not be put side by side.
    assert "pointwise" in plain.works and "pointwise" not in packed.works


@pytest.mark.parametrize("causal", [False, True])
def test_sparse_attention_counts_at_any_length_and_with_padding(causal):
    model, mask = self_attention(is_causal=causal), torch.ones(2, 90, dtype=torch.bool)
    x = torch.zeros(2, 90, 64)
    plain = count(model, x, training=True)[""]
    padded = count(model, {"x": x, "attn_mask": mask}, training=True)[""]
    layout = model.attention.layout(90, causal)
    assert plain.macs == padded.macs == round(layout.density * 90 * 90) * 2 * 2 * 64
    assert plain.works["attention"] == padded.works["attention"]
    assert model(torch.randn(2, 90, 64)).isfinite().all()  # the layout is real


class Checkpointed(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)),
        lambda: self_attention(proj_drop=0.1),
    ],
)
def test_a_checkpoint_moves_again_what_its_forward_does(make):
    part, x = make(), torch.zeros(2, 48, 64)
    forward, step = (total(count(part, x, training=t)) for t in (False, True))
    found = total(count(Checkpointed(part), x, training=True))
    assert found.pop("pointwise") == step.pop("pointwise") + forward["pointwise"]
    assert found == step  # its matmuls and attention once


def test_backward_of_a_loss_starts_there():
    class Model(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return {"logits": logits, "loss": logits.float().square().mean()}

    model, x = Model(64, 64), torch.zeros(8, 64)
    before = total(count(nn.Linear(64, 64), x, training=True))
    assert total(count(model, x, training=True))["pointwise"].count > 3
    assert model.weight.grad is None and before.keys() == {"dense", "reduction"}
    real = total(count(model, x, training=True, fake=False))
    assert real == total(count(model, x, training=True))


@pytest.mark.parametrize(("channels", "kind"), [(3, "unaligned convolution"), (16, "convolution")])
def test_convolution_counts_its_own_backward(channels, kind):
    model, x = nn.Conv2d(channels, 8, 3, bias=False), torch.zeros(4, channels, 5, 5)
    forward, step = (total(count(model, x, training=t))[kind] for t in (False, True))
    assert step.flops == 2 * forward.flops and step.count == 2  # no gradient of the image


def test_real_and_fake_runs_agree_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8))
    x, before = torch.randn(4, 3, 3, 3), {k: v.clone() for k, v in model.state_dict().items()}
    fake = count(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert fake["0"].macs == 4 * 8 * 27
    real = count(model, x, fake=False)
    assert {k: t.macs for k, t in real.items()} == {k: t.macs for k, t in fake.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_lstm_is_matmuls(training, fake):
    lstm = nn.LSTM(16, 32, batch_first=True)
    found = count(lstm, torch.zeros(2, 8, 16), training=training, fake=fake)[""]
    assert found.macs == 2 * 8 * (4 * 32 * (16 + 32))
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()


def test_pixelfly_layers_are_counted_as_what_they_are():
    layer = PixelflyLinear(256, 256, density=0.25, block_size=32)
    weights = layer.choice.block_weights + layer.choice.lowrank_weights
    assert count(nn.Sequential(layer), torch.zeros(8, 256))["0"].macs == 8 * weights
    # Its backward is twice its forward, and nothing beside.
    model, x = nn.Sequential(layer, nn.Linear(256, 64, bias=False)), torch.zeros(8, 256)
    found = count(model, x, training=True)
    assert "" not in found and set(found["0"].works) == {"dense"}


def test_our_operators_are_matmuls_outside_their_layers_too():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PixelflyLinear(256, 256, density=0.25, rank=0, block_size=32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return butterfly_lowrank_mm(x, self.layer.blocks, self.layer.layout)

    model = Direct()
    for training in (False, True):
        (tally,) = count(model, torch.zeros(8, 256), training=training).values()
        assert tally.macs == 8 * model.layer.choice.block_weights
        assert tally.works.keys() - {"pointwise"} == {"dense"} and tally.works["dense"].count == 1


def test_keyword_inputs():
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return self.fc(pixels)

    assert count(Keyed(), {"pixels": torch.zeros(4, 64)})["fc"].macs == 4 * 64 * 64


def test_model_that_looks_at_values_says_what_to_do():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum().item() > 0 else x

    with pytest.raises(RuntimeError, match="fake=False"):
        count(Looks(), torch.ones(4, 64))
    assert count(Looks(), torch.ones(4, 64), fake=False)["fc"].macs == 4 * 64 * 64
