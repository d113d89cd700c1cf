"""Plans: how a budget is spent, what a Plan says, saves and converts."""

from __future__ import annotations

import json
import time

import pytest
import torch
import vision_ops  # noqa: F401 (before timm and transformers)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_models import Block

from pixelfly import PixelflyConfig, sparsify_
from pixelfly.budget import CostModel, LayerPlan, Plan, Rate, count, layer_type, plan
from pixelfly.nn import AttentionConfig

H100 = CostModel.roofline("h100")


def mlp(width: int = 256, hidden: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def gpt2(layers: int, width: int, heads: int, **options) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, **options)
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.qkv", "attention qkv"),
        ("blocks.0.attn.proj", "attention out"),
        ("blocks.0.mlp.fc1", "mlp fc1"),
        ("transformer.h.1.attn.c_attn", "attention qkv"),
        ("transformer.h.1.attn.c_proj", "attention out"),
        ("transformer.h.1.mlp.c_proj", "mlp fc2"),
        ("model.layers.0.self_attn.o_proj", "attention out"),
        ("model.layers.0.mlp.gate_proj", "mlp fc1"),
        ("model.layers.0.mlp.down_proj", "mlp fc2"),
        ("bert.encoder.layer.0.attention.self.query", "attention qkv"),
        ("bert.encoder.layer.0.attention.output.dense", "attention out"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp fc1"),
        ("bert.encoder.layer.0.output.dense", "mlp fc2"),
        ("layers.0.linear2", "mlp fc2"),
        ("down.attn1.to_out.0", "attention out"),
        ("0", "other"),
        ("head", "other"),
    ],
)
def test_layer_types(name, kind):
    assert layer_type(name) == kind


# How a budget is spent


def test_shared_module_counts_both_calls():
    layer = nn.Linear(64, 64)
    result = plan(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(4, 64), params=1.0)
    assert [(x.name, x.tokens) for x in result.layers] == [("0", 8)]


def test_transformer_encoder_in_evaluation_calls_its_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 2)
    result = plan(model.eval(), torch.zeros(2, 16, 128), density=0.5, block_sizes=(16,))
    assert {x.type for x in result.planned} == {"mlp fc1", "mlp fc2"}
    assert all(x.reason for x in result.layers if x.name.endswith("out_proj"))


def test_gpt2_medium_is_planned_in_seconds():
    model = gpt2(24, 1024, 16)
    begin = time.perf_counter()
    result = plan(model, torch.zeros(8, 1024, dtype=torch.long), density=0.25, cost=H100)
    assert time.perf_counter() - begin < 10
    assert 0.24 < result.density <= 0.25
    assert {x.type for x in result.planned} == {
        "attention qkv",
        "attention out",
        "mlp fc1",
        "mlp fc2",
    }
    assert sum(x.tokens * x.dense_weights for x in result.planned) == 24 * 12 * 8192 * 1024**2
    (head,) = (x for x in result.layers if x.reason)
    assert "tied" in head.reason


@pytest.mark.parametrize("allocation", ["proportional", "time"])
@pytest.mark.parametrize(
    ("budget", "value"),
    [("density", 0.3), ("flops", 0.5), ("params", 0.4), ("params", 400_000), ("speedup", 1.05)],
)
def test_the_budget_is_kept_and_the_model_is_what_the_plan_says(allocation, budget, value):
    model, x = Block(), torch.randn(64, 16, 256)
    result = plan(
        model, x, **{budget: value}, cost=H100, allocation=allocation, block_sizes=(32, 16)
    )
    spent = {
        "density": result.density / value,
        "flops": result.flops / result.dense_flops / value,
        "params": result.params / (value if value > 1 else value * result.rest.params),
        "speedup": value / result.predicted_speedup,
    }[budget]
    assert 0.5 < spent <= 1 + 1e-9
    report = sparsify_(model, result)
    assert report.params_after == result.params
    assert {(r.name, r.nnz, r.rank, r.density) for r in report.layers} == {
        (x.name, x.nnz, x.rank, x.density) for x in result.planned
    }
    assert model(x).shape == x.shape
    assert 2 * sum(t.macs for t in count(model, x).values()) == result.flops


def test_proportional_keeps_one_density():
    result = plan(Block(512), torch.zeros(1, 64, 512), density=0.25, block_sizes=(32,))
    assert all(abs(x.density - 0.25) < 0.03 for x in result.planned)


def test_low_rank_gets_a_quarter_to_a_third():
    result = plan(Block(1024), torch.zeros(1, 64, 1024), density=0.25)
    for x in result.planned:
        share = x.rank * (x.in_features + x.out_features) / x.weights
        assert 0.2 < share < 0.4


def test_time_gives_no_less_density_for_the_same_time():
    x = torch.zeros(16, 256, 256)
    fair = plan(Block(), x, speedup=1.1, cost=H100, block_sizes=(32,))
    timed = plan(Block(), x, speedup=1.1, cost=H100, block_sizes=(32,), allocation="time")

    def worth(p: Plan) -> float:
        logs = [v.dense_weights * torch.tensor(v.density).log().item() for v in p.layers]
        return sum(logs)

    assert worth(timed) >= worth(fair) - 1e-6


def test_time_leaves_dense_what_is_faster_dense():
    slow = {"b32/forward": Rate(1.0, 0.0, 0.0), "b32/step": Rate(1.0, 0.0, 0.0)}
    cost = CostModel("slow", "bfloat16", {**H100.rates, **slow})
    options = {"cost": cost, "allocation": "time", "block_sizes": (32,)}
    result = plan(mlp(), torch.zeros(8, 256), speedup=1.0, **options)
    assert result.planned == ()
    assert result.predicted_speedup == 1.0
    assert sparsify_(mlp(), result).layers == []


def test_time_is_proportional_where_the_fastest_forms_are_too_large():
    # Small blocks are slow here and large ones cannot be as sparse as the budget wants.
    slow = {f"b16/{mode}": Rate(1.0, 0.0, 0.0) for mode in ("forward", "step")}
    cost = CostModel("slow", "bfloat16", {**H100.rates, **slow})
    options = {"density": 0.1, "cost": cost, "block_sizes": (64, 16)}
    timed = plan(mlp(), torch.zeros(8, 256), allocation="time", **options)
    fair = plan(mlp(), torch.zeros(8, 256), **options)
    assert timed.layers == fair.layers
    assert 0.06 < timed.density <= 0.1


@settings(max_examples=15, deadline=None)
@given(
    density=st.floats(0.2, 0.99),
    block=st.sampled_from([16, 32]),
    lowrank=st.sampled_from(["factored", "global"]),
)
def test_density_is_never_above_and_conversion_agrees(density, block, lowrank):
    model, like = mlp(192, 328), PixelflyConfig(lowrank=lowrank)
    result = plan(model, torch.zeros(4, 192), density=density, block_sizes=(block,), like=like)
    assert result.density <= density * (1 + 1e-9)
    assert sparsify_(model, result).params_after == result.params


@pytest.mark.parametrize(
    "like",
    [
        PixelflyConfig(rank=0),
        PixelflyConfig(rank=32, init="project"),
        PixelflyConfig(max_stride=2),
        PixelflyConfig(gate="token"),
        PixelflyConfig(gate="scalar"),
        PixelflyConfig(lowrank="global"),
    ],
)
def test_what_all_layers_have_in_common(like):
    model = mlp(512, 512)
    result = plan(model, torch.zeros(4, 512), density=0.4, block_sizes=(32,), like=like)
    assert sparsify_(model, result).params_after == result.params
    assert model[0].gate_kind == like.gate and model[0].choice.lowrank == like.lowrank
    if like.rank is not None:
        assert model[0].rank == like.rank


def test_fuse_mlp_goes_through_a_plan():
    from timm.layers import Mlp

    model = nn.Sequential(Mlp(256, 512))
    like = PixelflyConfig(fuse_mlp=True)
    result = plan(model, torch.zeros(4, 256), density=0.5, block_sizes=(32,), like=like)
    assert sparsify_(model, result).fused == ["0"]


def test_filter_chooses_the_layers():
    result = plan(Block(), torch.zeros(1, 8, 256), density=0.4, block_sizes=(32,), filter_fn="vit")
    assert [x.name for x in result.layers if x.reason] == ["attn.proj"]


def test_small_features_fall_back_to_smaller_blocks():
    result = plan(mlp(128, 128), torch.zeros(4, 128), density=0.3, block_sizes=(64, 32))
    assert {x.block_size for x in result.planned} == {32}


def vit_inputs() -> tuple[nn.Module, torch.Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=16), torch.zeros(2, 3, 64, 64)


def gpt2_inputs() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = gpt2(2, 128, 2, attn_pdrop=0.0, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ids = torch.zeros(2, 65, dtype=torch.long)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("make", "causal"), [(vit_inputs, False), (gpt2_inputs, True)])
def test_attention_over_a_layout_is_planned_around(make, causal, autocast, tmp_path):
    options = {"density": 0.5, "cost": H100, "block_sizes": (16,), "autocast": autocast}
    (model, x), attention = make(), AttentionConfig(block_size=16)
    dense = plan(model, x, **options)
    sparsify_(model, PixelflyConfig(attention=attention), filter_fn=lambda module, name: False)
    result = plan(model, x, **options)
    assert result.layers == dense.layers
    full, density = 2 * 2 * 2 * 65**2 * 128, attention.layout(65, causal).density
    assert 0.1 < density < 0.9
    assert dense.rest.macs - result.rest.macs == round(full * (1 - density))
    kept = result.rest.works["attention"]
    # GPT-2's dense attention gets its padding as a mask, with which nothing is skipped.
    assert kept.flops == round(2 * full * density) and kept.count == 2
    assert dense.rest.works["attention"].flops == 2 * full
    assert result.predicted_step().parts["attention"] > 0
    result.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result
    sparsify_(model, result)
    assert 2 * sum(t.macs for t in count(model, x).values()) == result.flops


# Bad input


BUDGET = "nearest reachable is ([0-9.]+)"


@pytest.mark.parametrize(
    "budget", [{"density": 0.01}, {"flops": 0.01}, {"params": 0.01}, {"params": 9}, {"speedup": 99}]
)
@pytest.mark.parametrize("allocation", ["proportional", "time"])
def test_unreachable_says_what_is_reachable_and_that_is(budget, allocation):
    ((name, value),) = budget.items()
    options = {"cost": H100, "allocation": allocation, "block_sizes": (32,)}
    x = torch.zeros(64, 256)
    with pytest.raises(ValueError, match=f"{name}={value:g} is not reachable.*{BUDGET}") as caught:
        plan(mlp(), x, **budget, **options)
    nearest = float(str(caught.value).split()[-1])
    plan(mlp(), x, **{name: nearest}, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of density, flops, params, speedup.*got none"),
        ({"density": 0.1, "params": 9}, ValueError, "exactly one .* got density, params"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
        ({"density": float("nan")}, ValueError, "density must be in"),
        ({"density": "0.5"}, TypeError, "density must be a number, got str"),
        ({"params": 0}, ValueError, "params must be above 0"),
        ({"speedup": 0.5, "cost": H100}, ValueError, "speedup must be at least 1"),
        ({"speedup": 2}, ValueError, "speedup needs cost=CostModel"),
        ({"density": 0.5, "allocation": "time"}, ValueError, "allocation='time' needs cost"),
        ({"density": 0.5, "allocation": "best"}, ValueError, "'proportional' or 'time'"),
        ({"density": 0.5, "cost": "h100"}, TypeError, "cost must be a CostModel"),
        ({"density": 0.5, "like": 0.5}, TypeError, "like must be a PixelflyConfig"),
        ({"density": 0.5, "autocast": torch.float16}, TypeError, "autocast must be a bool"),
        ({"density": 0.5, "block_sizes": (24,)}, ValueError, "block_sizes must be among"),
        ({"density": 0.5, "block_sizes": ()}, ValueError, "block_sizes must be among"),
        ({"density": 0.5, "filter_fn": "bert"}, ValueError, "filter_fn must be one of"),
        ({"density": 0.5, "filter_fn": lambda m, n: False}, ValueError, "no layer that can be"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        plan(mlp(), torch.zeros(4, 256), **options)


def test_autocast_needs_a_dtype_to_cast_to():
    cost = CostModel("a CPU", "float32", H100.rates)
    with pytest.raises(
        ValueError, match="autocast=True needs .* bfloat16 or float16, got one in f"
    ):
        plan(mlp(), torch.zeros(4, 256), density=0.5, cost=cost, autocast=True)
    made = plan(mlp(), torch.zeros(4, 256), density=0.5, autocast=True)
    with pytest.raises(ValueError, match="predicted_step: autocast=True needs"):
        made.predicted_step(cost)


def test_bad_model():
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        plan(3, torch.zeros(4, 256), density=0.5)
    with pytest.raises(ValueError, match="model itself"):
        plan(nn.Linear(256, 256), torch.zeros(4, 256), density=0.5)
    with pytest.raises(ValueError, match="lazy"):
        plan(nn.Sequential(nn.LazyLinear(8)), torch.zeros(4, 256), density=0.5)
    with pytest.raises(ValueError, match="multiple of 8"):
        plan(mlp(100, 100), torch.zeros(4, 100), density=0.5)


# What a Plan does


def test_saves_and_loads(tmp_path):
    result = plan(Block(), torch.zeros(1, 8, 256), density=0.4, cost=H100, block_sizes=(32,))
    result.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == result
    assert loaded.predicted_step() == result.predicted_step()
    assert str(loaded) == str(result)
    data = json.loads((tmp_path / "plan.json").read_text())
    with pytest.raises(ValueError, match="version must be 3, got 7"):
        Plan.from_dict({**data, "version": 7})
    with pytest.raises(ValueError, match=r"format must be 'pixelfly.Plan', got None"):
        Plan.from_dict({"version": 1})


def test_another_model_is_refused():
    result = plan(mlp(), torch.zeros(4, 256), density=0.4, block_sizes=(32,))
    with pytest.raises(ValueError, match="linear layer '0' of .* got one of"):
        sparsify_(mlp(128, 512), result)
    with pytest.raises(ValueError, match="layer '0' .* got none"):
        sparsify_(Block(), result)
    model = mlp()
    sparsify_(model, result)
    with pytest.raises(ValueError, match="got a PixelflyLinear"):
        sparsify_(model, result)
    with pytest.raises(TypeError, match="PixelflyConfig or a Plan, got dict"):
        sparsify_(mlp(), result.to_dict())


def test_what_was_counted_in_another_dtype_is_resized():
    x, options = torch.zeros(512, 256), {"density": 0.25, "block_sizes": (32,)}
    own = plan(mlp(), x, cost=H100, **options)
    for other in (plan(mlp(), x, **options), plan(mlp(), x, cost=H100, fake=False, **options)):
        for dense in (False, True):
            found = other.predicted_step(H100, dense=dense).parts
            assert found == pytest.approx(own.predicted_step(H100, dense=dense).parts)
    made = plan(mlp(), x, cost=H100, fake=False, speedup=1.2)  # the search predicts the same
    assert made.predicted_speedup >= 1.2
    twin = plan(mlp(), x, cost=H100, speedup=1.2)
    assert [x.nnz for x in made.layers] == [x.nnz for x in twin.layers]


def test_predicted_step_has_parts():
    x = torch.zeros(64, 16, 256)
    train = plan(Block(), x, density=0.4, cost=H100, block_sizes=(32,))
    infer = plan(Block(), x, density=0.4, cost=H100, block_sizes=(32,), training=False)
    step, forward = train.predicted_step(), infer.predicted_step()
    assert set(step.parts) == {
        *("attention qkv", "attention out", "mlp fc1", "mlp fc2"),
        *("attention", "pointwise", "strided copies", "optimizer"),
    }
    assert step.total == pytest.approx(sum(step.parts.values()))
    # The gradients of q, k and v are put together.
    assert set(step.parts) - set(forward.parts) == {"optimizer", "strided copies"}
    assert step.parts["mlp fc1"] == pytest.approx(3 * forward.parts["mlp fc1"])
    cast = plan(Block(), x, density=0.4, cost=H100, block_sizes=(32,), autocast=True)
    for dense in (False, True):
        parts, plain = (p.predicted_step(dense=dense).parts for p in (cast, train))
        assert parts["optimizer"] == pytest.approx(2 * plain["optimizer"])
        assert parts["mlp fc1"] > plain["mlp fc1"]
    assert Plan.from_dict(json.loads(json.dumps(cast.to_dict()))) == cast
    assert train.predicted_step(CostModel.roofline("b200")).total < step.total
    bare = plan(Block(), x, density=0.4, block_sizes=(32,))
    assert bare.predicted_speedup is None
    with pytest.raises(ValueError, match="cost must be a CostModel"):
        bare.predicted_step()


@pytest.mark.parametrize("width", [60, 200])
def test_prints(width):
    from rich.console import Console

    result = plan(Block(), torch.zeros(1, 8, 256), density=0.4, cost=H100, block_sizes=(32,))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(result)
    for shown in (console.export_text(), str(result)):
        for word in ("mlp fc1", "predicted", "density=0.4"):
            assert word in shown


def test_plots(tmp_path):
    result = plan(Block(), torch.zeros(1, 8, 256), density=0.4, cost=H100, block_sizes=(32,))
    figure = result.plot(tmp_path / "plan.png")
    assert len(figure.axes) == 2 and (tmp_path / "plan.png").stat().st_size > 1000


def test_layer_plan_density():
    assert LayerPlan("a", "other", 8, 8, 1, weights=16).density == 0.25
