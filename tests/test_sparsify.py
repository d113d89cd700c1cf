"""Conversion of whole models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import vision_ops  # noqa: F401 (before timm and transformers)
from torch import nn

from pixelfly.masks import block_diagonal
from pixelfly.nn import PixelflyLinear, PixelflyMLP
from pixelfly.nn.dense import match_activation
from pixelfly.sparsify import PRESETS, PixelflyConfig, sparsify_

SMALL = PixelflyConfig(density=0.5, block_size=16)
PUBLISHED = PixelflyConfig(density=0.25, rank=0)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def small_gpt2(transformers, layers=4, dropout=0.0, **options):
    config = transformers.GPT2Config(
        n_embd=64, n_layer=layers, n_head=2, n_positions=32, vocab_size=96,
        resid_pdrop=dropout, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class TestPublishedCounts:
    """The published parameter counts, met by 25 % density without low rank, b = 64."""

    @pytest.mark.parametrize(
        ("name", "preset", "layers", "count", "published"),
        [
            ("vit_base_patch16_224", "vit", 36, 28_175_080, 28.2e6),
            ("mixer_b16_224", "mixer", 24, 17_413_144, 17.4e6),
        ],
    )
    def test_timm(self, timm, name, preset, layers, count, published):
        with torch.device("meta"):
            model = timm.create_model(name)
        report = sparsify_(model, PUBLISHED, preset)
        assert report.params_after == sum(p.numel() for p in model.parameters()) == count
        assert count == pytest.approx(published, rel=0.01)
        assert len(report.layers) == layers and not report.skipped
        assert {layer.density for layer in report.layers} == {0.25}
        assert report.macs_after * 4 == report.macs_before
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)

    @pytest.mark.parametrize(
        ("width", "depth", "count", "published"),
        [(1024, 24, 203_828_224, 203.8e6), (768, 12, 81_972_480, 82e6)],
    )
    def test_gpt2(self, transformers, width, depth, count, published):
        config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=width // 64)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        report = sparsify_(model, PUBLISHED, "gpt2")
        assert report.params_after == count
        assert count == pytest.approx(published, rel=0.01)
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_with_low_rank_never_above(self, timm):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        report = sparsify_(model, PixelflyConfig(), "vit")
        assert {layer.rank for layer in report.layers} == {48}
        assert all(0.24 < layer.density <= 0.25 for layer in report.layers)


class TestInitSurvives:
    def variances(self, model, converted, names):
        for name in names:
            dense, sparse = model.get_submodule(name), converted.get_submodule(name)
            assert isinstance(sparse, PixelflyLinear), name
            weight = dense.weight.T if type(dense).__name__ == "Conv1D" else dense.weight
            ratio = sparse.to_dense().weight.square().mean() / weight.square().mean()
            assert ratio.item() == pytest.approx(1, rel=0.05), name
            assert torch.equal(sparse.bias, dense.bias), name

    @pytest.mark.parametrize("rank", [0, None])
    def test_gpt2_residual_projections(self, transformers, rank):
        config = transformers.GPT2Config(n_embd=256, n_layer=3, n_head=4, vocab_size=64)
        model = transformers.GPT2LMHeadModel(config)
        converted = copy.deepcopy(model)
        sparsify_(converted, PixelflyConfig(density=0.3, block_size=16, rank=rank), "gpt2")
        names = [f"transformer.h.{i}.mlp.{n}" for i in range(3) for n in ("c_fc", "c_proj")]
        self.variances(model, converted, names)
        stds = [converted.get_submodule(n).init_std for n in names[:2]]
        assert stds[1] / stds[0] == pytest.approx(6**-0.5, rel=0.02)

    def test_timm(self, timm):
        model = timm.create_model("vit_tiny_patch16_224", depth=2)
        converted = copy.deepcopy(model)
        report = sparsify_(converted, PixelflyConfig(density=0.4, block_size=16), "vit")
        self.variances(model, converted, [layer.name for layer in report.layers])

    def test_zero_layers_stay_zero(self):
        model = nn.Sequential(nn.Linear(64, 64))
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        sparsify_(model, SMALL)
        assert model(torch.randn(3, 64)).abs().max() == 0
        model[0].reset_parameters()
        assert model[0].to_dense().weight.abs().max() == 0

    def test_frozen_and_mode_and_dtype(self):
        model = nn.Sequential(nn.Linear(128, 128, dtype=torch.bfloat16)).eval()
        model[0].weight.requires_grad_(False)
        sparsify_(model, SMALL)
        layer = model[0]
        assert not layer.blocks.requires_grad and not layer.u.requires_grad
        assert layer.bias.requires_grad and not layer.training
        assert layer.blocks.dtype == layer.u.dtype == torch.bfloat16


def test_project_keeps_what_the_structure_can_hold(transformers):
    torch.manual_seed(0)
    model = small_gpt2(transformers).eval()
    layout = block_diagonal(256, 64, block_size=16)
    for block in model.transformer.h:
        with torch.no_grad():  # a block-diagonal weight is part of every butterfly
            block.mlp.c_fc.weight.mul_(layout.to_dense().T)
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    config = PixelflyConfig(density=0.5, block_size=16, init="project", rank=0)
    report = sparsify_(model, config, lambda m, name: name.endswith("c_fc"))
    assert len(report.layers) == 4
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


class TestWhatStaysDense:
    def reasons(self, model, config=SMALL, filter_fn=None):
        report = sparsify_(model, config, filter_fn)
        return {s.name: s.reason for s in report.skipped}

    def test_features_and_size(self):
        model = nn.ModuleDict(
            {
                "odd": nn.Linear(64, 10),
                "small": nn.Linear(16, 16),
                "good": nn.Linear(64, 64),
            }
        )
        reasons = self.reasons(model, PixelflyConfig(density=0.25, block_size=16, rank=0))
        assert "out_features must be a positive multiple of 8, got 10" in reasons["odd"]
        assert "nearest reachable is 1" in reasons["small"]
        assert "good" not in reasons and isinstance(model["good"], PixelflyLinear)

    def test_tied_weights(self, transformers):
        model = small_gpt2(transformers)
        reasons = self.reasons(model)
        assert reasons == {"lm_head": "its weights are tied to transformer.wte"}
        assert model.lm_head.weight is model.transformer.wte.weight
        two = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        two[1].weight = two[0].weight
        assert set(self.reasons(two)) == {"0", "1"}

    def test_subclasses_parametrizations_hooks_and_lazy_layers(self):
        class Mine(nn.Linear):
            pass

        hooked = nn.Linear(64, 64)
        hooked.register_forward_hook(lambda *args: None)
        model = nn.ModuleDict(
            {
                "mine": Mine(64, 64),
                "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
                "hooked": hooked,
                "lazy": nn.LazyLinear(64),
                "attention": nn.MultiheadAttention(64, 2),
            }
        )
        reasons = self.reasons(model)
        assert set(reasons) == {"mine", "normed", "hooked", "lazy", "attention.out_proj"}
        assert "subclass" in reasons["mine"]
        assert "parametrized" in reasons["normed"]
        assert "hooks" in reasons["hooked"]
        assert "lazy" in reasons["lazy"]
        query = torch.randn(3, 1, 64)
        assert model["attention"](query, query, query)[0].shape == (3, 1, 64)

    def test_parents_that_read_the_weight(self):
        """timm's BEiT and transformers' T5 do; calling such a layer would be skipped."""

        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.proj = nn.Linear(64, 64), nn.Linear(64, 64)
                nn.init.zeros_(self.proj.weight)

            def forward(self, x):
                return self.proj(nn.functional.linear(x, self.qkv.weight))

        model = nn.Sequential(Reads())
        reasons = self.reasons(model)
        assert reasons == {"0.qkv": "Reads.forward reads its weight instead of calling it"}
        assert model(torch.randn(2, 64)).shape == (2, 64)

    def test_not_smaller(self):
        assert (
            "not smaller"
            in self.reasons(
                nn.Sequential(nn.Linear(64, 64)), PixelflyConfig(density=1.0, block_size=16, rank=0)
            )["0"]
        )

    def test_gate_without_room_for_a_low_rank(self):
        config = PixelflyConfig(density=0.25, block_size=32, gate="scalar")
        assert "none fits" in self.reasons(nn.Sequential(nn.Linear(192, 192)), config)["0"]


def test_shared_modules_stay_shared():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    report = sparsify_(model, SMALL)
    assert model["a"] is model["b"][0] and isinstance(model["a"], PixelflyLinear)
    assert len(report.layers) == 1 and "shared with b.0" in str(report)
    assert report.params_after == sum(p.numel() for p in model.parameters())


def test_notes_of_one_layer_are_apart():
    shared = nn.Linear(256, 256)
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = sparsify_(model, PixelflyConfig(density=0.13, block_size=32))
    assert report.layers[0].note.startswith("no low rank")
    assert report.layers[0].note.endswith("above the density; shared with b")


def test_transformer_encoder_in_eval_mode():
    """torch's inference fast path reads dense weights; it must not be taken."""
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    sparsify_(model, SMALL)
    x = torch.randn(2, 5, 64)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    trained = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        inferred = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(inferred[~padding], trained[~padding])


class TestFusedMLP:
    config = PixelflyConfig(density=0.5, block_size=16, fuse_mlp=True)

    def test_timm(self, timm):
        model = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=8
        )
        plain = copy.deepcopy(model)
        report = sparsify_(model, self.config, "vit")
        assert report.fused == ["blocks.0.mlp", "blocks.1.mlp"]
        assert isinstance(model.blocks[0].mlp, PixelflyMLP)
        assert model.blocks[0].mlp.fc1.activation == "gelu"
        sparsify_(plain, SMALL, "vit")
        plain.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)

    def test_gpt2(self, transformers):
        model = small_gpt2(transformers)
        plain = copy.deepcopy(model)
        report = sparsify_(model, self.config, "gpt2")
        assert len(report.fused) == 4 and not report.notes
        assert model.transformer.h[0].mlp.c_fc.activation == "gelu_tanh"
        sparsify_(plain, SMALL, "gpt2")
        plain.load_state_dict(model.state_dict())
        ids = torch.randint(0, 96, (2, 9))
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)

    def test_recompute(self, transformers):
        model = small_gpt2(transformers)
        sparsify_(model, dataclasses.replace(self.config, recompute_mlp=True), "gpt2")
        assert all(block.mlp.recompute for block in model.transformer.h)
        with pytest.raises(ValueError, match="recompute_mlp=True needs fuse_mlp=True"):
            PixelflyConfig(recompute_mlp=True)

    def test_dropout_is_not_fused(self, transformers):
        model = small_gpt2(transformers, dropout=0.1)
        report = sparsify_(model, self.config, "gpt2")
        assert not report.fused and "dropout is 0.1" in report.notes[0]
        assert isinstance(model.transformer.h[0].mlp.c_fc, PixelflyLinear)
        assert model.transformer.h[0].mlp.c_fc.activation is None

    def test_other_activation_and_half_converted(self, transformers, timm):
        model = small_gpt2(transformers, activation_function="tanh")
        assert "activation Tanh" in sparsify_(model, self.config, "gpt2").notes[0]
        mlp = nn.Sequential(timm.layers.Mlp(64, 256))
        assert not sparsify_(mlp, self.config, lambda m, name: name.endswith("fc1")).fused
        assert isinstance(mlp[0], timm.layers.Mlp)
        root = sparsify_(timm.layers.Mlp(64, 256), self.config)
        assert "the model itself" in root.notes[0]

    def test_activations_are_told_by_what_they_compute(self):
        class Renamed(nn.Module):
            def forward(self, x):
                return x * torch.sigmoid(x)

        assert match_activation(Renamed()) == "silu"
        assert match_activation(nn.GELU()) == "gelu"
        assert match_activation(nn.GELU(approximate="tanh")) == "gelu_tanh"
        assert match_activation(nn.ReLU(inplace=True)) == "relu"
        for other in (nn.Identity(), nn.Tanh(), nn.PReLU(), nn.Linear(4, 4), nn.Hardswish()):
            assert match_activation(other) is None


def test_report_prints():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    report = sparsify_(model, SMALL)
    text = str(report)
    assert "left dense: 2 (64->10)" in text and "model: 8.91K" in text
    layer = report.layers[0]
    assert layer.params_after == sum(p.numel() for p in model[0].parameters())
    assert report.macs_before == 128 * 64 and report.macs_after <= 128 * 64 / 2
    assert report.to_dict()["layers"][0]["name"] == "0"
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=140, file=open("/dev/null", "w"))
    console.print(report)
    assert "left dense: 2" in console.export_text()


def test_report_says_what_was_missed_and_groups_what_stayed():
    model = nn.Sequential(nn.Linear(384, 1536), nn.Linear(1536, 384), nn.Linear(384, 10))
    model.append(nn.Linear(384, 10))
    report = sparsify_(model, PixelflyConfig(block_size=32))
    text = str(report)
    missed = "density 0.25 is not met exactly in 2 layers: 0.2188 is the nearest not above it with"
    assert f"{missed} rank {report.layers[0].rank}" in text
    assert "left dense: 2, 3 (384->10)" in text
    assert {layer.requested for layer in report.layers} == {0.25}
    rich = pytest.importorskip("rich.console")
    for width in (80, 140):
        console = rich.Console(width=width, record=True, file=open("/dev/null", "w"))
        console.print(report)
        table = console.export_text()
        assert "0.2188" in table and "129.02K" in table and ("was" in table) == (width == 140)


def test_training_step():
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    sparsify_(model, SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, target = torch.randn(256, 64), torch.randn(256, 64)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, "density must be in"),
        ({"block_size": 24}, "block_size must be"),
        ({"rank": -1}, "rank must be a non-negative"),
        ({"rank": 16, "lowrank": "global"}, "multiple of block_size=64"),
        ({"lowrank": "none"}, "lowrank must be"),
        ({"gate": "tokens"}, "gate must be"),
        ({"gate": "scalar", "rank": 0}, "needs lowrank='factored'"),
        ({"init": "svd"}, "init must be 'scratch' or 'project'"),
        ({"max_stride": 3}, "max_stride must be a power of two"),
        ({"max_stride": 4, "rank": 8}, "cannot all be given"),
    ],
)
def test_bad_config(options, match):
    with pytest.raises(ValueError, match=match):
        PixelflyConfig(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", "0.25"),
        ("density", True),
        ("block_size", 64.0),
        ("rank", True),
        ("max_stride", 4.0),
        ("max_stride", "4"),
    ],
)
def test_config_of_wrong_types(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got {value!r}"):
        PixelflyConfig(**{name: value})


def test_bad_arguments():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="one of 'vit', 'mixer', 'gpt2', got 'bert'"):
        sparsify_(model, None, "bert")
    with pytest.raises(TypeError, match="filter_fn must be a function"):
        sparsify_(model, None, 3)
    with pytest.raises(TypeError, match="config must be a PixelflyConfig"):
        sparsify_(model, 0.25)
    with pytest.raises(TypeError, match="model must be a Module"):
        sparsify_([model])
    with pytest.raises(TypeError, match="itself a linear layer"):
        sparsify_(nn.Linear(64, 64))
    assert isinstance(model[0], nn.Linear) and set(PRESETS) == {"vit", "mixer", "gpt2"}
