"""Learning rates by structure."""

from __future__ import annotations

import copy
import importlib
import json
import pathlib

import pytest
import torch
from torch import nn

from pixelfly import PixelflyConfig, PixelflyLinear, param_groups, sparsify_
from pixelfly.masks import BlockLayout


def find(groups: list[dict], parameter: nn.Parameter) -> dict:
    (group,) = (g for g in groups if any(p is parameter for p in g["params"]))
    return group


def network(width: int, *, pixelfly: bool = False) -> nn.Module:
    layers = [nn.Linear(64, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.GELU(), nn.Linear(width, 10))
    if pixelfly:
        config = PixelflyConfig(density=0.25, block_size=16)
        sparsify_(model, config, lambda module, name: name == "3")
    return model


def test_every_trained_parameter_is_in_one_group():
    model = network(256, pixelfly=True)
    model[0].weight.requires_grad_(False)
    groups = param_groups(model, 1e-3, 0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)


def test_scales_of_a_layer():
    layer = PixelflyLinear(512, 256, density=0.25, block_size=32)
    groups = param_groups(layer, 0.01, 0.1)
    kept = layer.layout.nnz / 8 * 32
    for name, scale in {"blocks": 512 / kept, "u": 1.0, "v": 1.0}.items():
        group = find(groups, getattr(layer, name))
        assert group["role"] == name
        assert group["scale"] == pytest.approx(scale)
        assert group["lr"] == pytest.approx(0.01 * scale)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.01 * 0.1)
    bias = find(groups, layer.bias)
    assert (bias["lr"], bias["weight_decay"]) == (0.01, 0.0)


def test_full_blocks_alone_learn_like_dense():
    layout = BlockLayout.from_grid(torch.ones(4, 4, dtype=torch.bool), 16, 64, 64)
    layer = PixelflyLinear(64, 64, layout=layout, rank=0)
    assert find(param_groups(layer, 1e-3), layer.blocks)["scale"] == 1.0


def test_ragged_rows_count_by_their_mean_and_empty_ones_not():
    grid = torch.zeros(4, 4, dtype=torch.bool)
    grid[0], grid[1, 0] = True, True
    layer = PixelflyLinear(64, 64, layout=BlockLayout.from_grid(grid, 16, 64, 64), rank=0)
    assert find(param_groups(layer, 1e-3), layer.blocks)["scale"] == pytest.approx(64 / 40)


@pytest.mark.parametrize("gate", ["scalar", "token"])
def test_gates_have_no_decay_and_double_what_they_halve(gate):
    plain = PixelflyLinear(256, 256, density=0.25, block_size=16)
    gated = PixelflyLinear(256, 256, density=0.25, block_size=16, gate=gate)
    a, b = param_groups(plain, 1.0, 0.1), param_groups(gated, 1.0, 0.1)
    for name, factor in (("blocks", 2), ("u", 2), ("v", 1)):
        scales = [find(g, getattr(m, name))["scale"] for g, m in ((a, plain), (b, gated))]
        assert scales[1] == pytest.approx(factor * scales[0])
    assert find(b, gated.gate)["weight_decay"] == 0
    assert find(b, gated.gate)["role"] == "gate"


def test_width_scaling_against_a_base():
    model, base = network(256, pixelfly=True), network(64)
    groups = param_groups(model, 1e-3, 0.1, base=base)
    assert find(groups, model[0].weight)["scale"] == 1.0  # pixels do not grow
    assert find(groups, model[5].weight)["scale"] == 0.25
    assert find(groups, model[1].weight)["scale"] == 1.0  # norm
    alone = param_groups(model, 1e-3, 0.1)
    for name in ("blocks", "u", "v"):
        p = getattr(model[3], name)
        assert find(groups, p)["scale"] == pytest.approx(0.25 * find(alone, p)["scale"])


def test_first_step_moves_the_output_as_a_dense_layer_does():
    # The claim behind the scales: with aligned inputs, Adam's first step of blocks, u and v
    # together moves y about as far as it moves the dense layer's.
    x, direction = torch.randn(1, 1024), torch.randn(1, 1024)
    moved = {}
    for name, layer in (
        ("dense", nn.Linear(1024, 1024)),
        ("pixelfly", PixelflyLinear(1024, 1024, density=0.25, block_size=32)),
    ):
        optimizer = torch.optim.AdamW(param_groups(layer, 1e-4), weight_decay=0)
        before = layer(x)
        (before * direction).sum().backward()
        optimizer.step()
        moved[name] = (layer(x) - before).detach().abs().mean()
    assert 0.5 < moved["pixelfly"] / moved["dense"] < 2


def test_the_default_optimizer_trains_soundly():
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    target = (x @ torch.randn(64, 10)).argmax(1)
    for grouped in (False, True):
        model = network(256, pixelfly=True)
        parameters = param_groups(model, 2e-3) if grouped else model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=2e-3)
        losses = []
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]


def test_tied_embedding_is_an_embedding():
    model = nn.Module()
    model.head = nn.Linear(64, 100, bias=False)
    model.embed = nn.Embedding(100, 64)
    model.head.weight = model.embed.weight
    base = copy.deepcopy(model)
    base.head = nn.Linear(16, 100, bias=False)
    (group,) = param_groups(model, 1e-3, 0.1, base=base)
    assert (group["role"], group["scale"]) == ("embedding", 1.0)


def test_attention_and_convolutions_have_fan_ins():
    def build(d: int) -> nn.Module:
        conv = nn.Conv2d(d, d, 3)
        return nn.ModuleDict({"attn": nn.MultiheadAttention(d, 4), "conv": conv})

    model = build(64)
    groups = param_groups(model, 1e-3, base=build(16))
    for p in (model["attn"].in_proj_weight, model["attn"].out_proj.weight, model["conv"].weight):
        assert find(groups, p)["scale"] == 0.25


def test_names_without_decay():
    class Named(nn.Sequential):
        def no_weight_decay(self) -> set[str]:
            return {"0.weight"}

    model = Named(nn.Linear(8, 8), nn.Linear(8, 8))
    groups = param_groups(model, 1e-3, 0.1, no_decay=["1.weight"])
    assert {g["weight_decay"] for g in groups} == {0.0}


def test_base_on_the_meta_device_and_schedulers():
    with torch.device("meta"):
        base = network(64)
    groups = param_groups(network(256, pixelfly=True), 1e-3, base=base)
    optimizer = torch.optim.AdamW(groups)
    rates = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler.get_last_lr() == pytest.approx([0.5 * rate for rate in rates])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", 1e-3), TypeError, "model must be a Module, got str"),
        ((nn.Linear(8, 8), "1e-3"), TypeError, "lr must be a number, got str"),
        ((nn.Linear(8, 8), 0.0), ValueError, "lr must be above 0"),
        ((nn.Linear(8, 8), float("nan")), ValueError, "lr must be above 0"),
        ((nn.Linear(8, 8), 1e-3, -1), ValueError, "weight_decay must be 0 or above"),
        ((nn.LazyLinear(8), 1e-3), ValueError, "lazy"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        param_groups(*arguments)


def test_bad_names_and_bases():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no_decay must name parameters, got 0.wieght"):
        param_groups(model, 1e-3, no_decay=["0.wieght"])
    with pytest.raises(TypeError, match="got a str"):
        param_groups(model, 1e-3, no_decay="0.weight")
    with pytest.raises(ValueError, match="got one without '0'"):
        param_groups(model, 1e-3, base=nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="base must be a Module, got int"):
        param_groups(model, 1e-3, base=64)


def test_width_sweep_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).resolve().parent.parent / "benchmarks")
    sweep = importlib.import_module("width_sweep")
    options = "--widths 32 64 --log2-lrs -8 -6 --layers 1 --density 0.5 --steps 3 --seeds 1"
    sweep.main([*options.split(), "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "width_sweep_digits_cpu.json").read_text())
    assert len(result["records"]) == 4 * 2 * 2
    assert set(result["summary"]) == set(sweep.ARMS)
    assert (tmp_path / "width_sweep_digits_cpu.png").exists()
    # The smallest width is the base, where dense groups change no learning rate.
    losses = {(r["arm"], r["width"], r["log2_lr"]): r["loss"] for r in result["records"]}
    assert losses["dense", 32, -8] == pytest.approx(losses["dense, param_groups", 32, -8], rel=0.01)
