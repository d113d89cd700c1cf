"""benchmarks/recipe.py and benchmarks/text.py on the CPU, on data small enough for seconds."""

from __future__ import annotations

import json

import data
import numpy as np
import plan
import projection
import pytest
import recipe
import recipe_show
import text
import torch
import vision_ops  # noqa: F401  (before timm and transformers)
from loop import rates
from recipe_patterns import NAMES, convert, groups_of
from structures import MonarchLinear, RiglLinear, monarch_sizes
from torch import nn

TINY = ["--device", "cpu", "--width", "64", "--layers", "1", "--batch", "8", "--density", "0.5"]
TINY += ["--block-size", "16", "--evals", "2", "--moves", "2"]


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Idx files as Fashion-MNIST's, of noise whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 40)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = (rng.integers(0, 20, (count, 28, 28)) + 20 * labels[:, None, None]).astype("u1")
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    monkeypatch.setattr(data, "FASHION_PLACES", (".",))
    return tmp_path


def run(folder, *options, out="r.json"):
    path = folder / out
    words = [*TINY, "--data-dir", folder, "--out", path, *options]
    assert recipe.main(list(map(str, words))) == 0
    return json.loads(path.read_text())["records"]


def test_every_pattern_trains_and_is_resumed(clothes, capsys):
    options = ["--tasks", "mixer-fashion-mnist", "--steps", 8]
    first = run(clothes, *options, "--patterns", "dense", "rigl", "--save", clothes / "kept")
    weights = clothes / "kept" / "mixer-fashion-mnist-seed0-lr0.001.pt"
    words = [weights, "--min-side", 64, "--block-size", 16, "--out", clothes / "p.json"]
    assert projection.main(list(map(str, words))) == 0
    for record in json.loads((clothes / "p.json").read_text())["records"]:
        errors = record["errors"]
        assert max(errors["fitted"], errors["split"]) <= errors["one-shot"] + 1e-6
        assert errors["butterfly"] <= errors["butterfly one-shot"] + 1e-6
    records = run(clothes, *options)
    assert records[:2] == first  # not trained again
    assert sorted(r["pattern"] for r in records) == sorted(NAMES)
    for r in records:
        assert r["density"] == 1 if r["pattern"] == "dense" else r["density"] <= 0.5 + 1e-6
        assert [p["step"] for p in r["curve"]] == [4, 8] and not r["diverged"]
    output = capsys.readouterr().out
    assert "rigl" in output and "butterfly+low-rank" in output
    assert (clothes / "r_mixer-fashion-mnist.png").exists()
    with pytest.raises(SystemExit, match="steps was 8, now 9"):
        run(clothes, "--tasks", "mixer-fashion-mnist", "--steps", 9)


def test_same_settings_train_the_same_and_the_best_rate_is_chosen(clothes):
    options = ["--tasks", "vit-fashion-mnist", "--steps", 12, "--patterns", "butterfly"]
    records = run(clothes, *options, "--lr", "1e-5", "3e-3", "--seeds", 0, 1)
    (again,) = run(clothes, *options, "--lr", "3e-3", out="other.json")
    same = next(r for r in records if (r["lr"], r["seed"]) == (3e-3, 0))
    assert again["test_loss"] == same["test_loss"]
    chosen = recipe_show.at_best_rate(records, text=True)["butterfly"]
    assert {r["lr"] for r in chosen} == {3e-3} and len(chosen) == 2


def test_time_limit_ends_between_runs(clothes, capsys):
    options = ["--tasks", "mixer-fashion-mnist", "--steps", 2, "--time-limit", 0]
    path = clothes / "r.json"
    words = [*TINY, "--data-dir", clothes, "--out", path, *options]
    assert recipe.main(list(map(str, words))) == 0
    assert not path.exists() and "left 11 runs over" in capsys.readouterr().out.replace("\n", " ")


def test_text_is_prepared_and_trained_on(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    words = np.random.default_rng(0).choice(
        "the quick brown fox jumps over lazy dogs".split(), 9000
    )
    for i in range(120):
        (source / f"{i}.rst").write_text(" ".join(words[i * 75 : i * 75 + 75]))
    page = '<div class="body" role="main"><p>one &amp; two</p></div><div class="sphinxsidebar">x'
    (source / "7.html").write_text(page)
    found = dict(text.documents([source]))
    assert found["source/7.html"] == "one & two" and "source/7.rst" not in found
    assert (
        text.main(
            ["--source", str(source), "--out", str(tmp_path / "gpt2-text"), "--vocabulary", "300"]
        )
        == 0
    )
    options = ["--tasks", "gpt2-text", "--steps", 4, "--length", 16]
    records = run(tmp_path, *options, "--patterns", "dense", "butterfly+low-rank", "monarch")
    assert all(r["test_bits_per_byte"] > 0 for r in records)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="python benchmarks/text.py --out"):
        run(tmp_path, "--tasks", "gpt2-text", "--steps", 2)
    with pytest.raises(data.DataMissing, match="apt-get install linux-doc-6.1"):
        text.debian_sources(tmp_path)
    monkeypatch.setattr(data, "FASHION_PLACES", (".",))
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        run(tmp_path, "--tasks", "mixer-fashion-mnist", "--steps", 2)


def test_monarch_is_a_linear_map_of_its_density():
    layer = MonarchLinear(512, 2048, True, 0.25, std=0.02)
    assert 0.22 < layer.density <= 0.25
    x = torch.randn(256, 3, 512)
    y = layer(x) - layer.bias
    assert y.shape == (256, 3, 2048)
    assert y.std().item() == pytest.approx(0.02 * 512**0.5, rel=0.1)  # a dense layer's
    torch.testing.assert_close(layer(2 * x) - layer.bias, 2 * y, rtol=1e-4, atol=1e-4)
    # Every output sees every input.
    weight = layer(torch.eye(512)) - layer.bias
    assert weight.ne(0).all()
    with pytest.raises(ValueError, match="not reachable"):
        monarch_sizes(512, 512, 0.01)


def test_rigl_moves_blocks_to_where_the_gradient_is():
    layer = RiglLinear(64, 64, False, 0.25, 0.1, 16, seed=0)
    mask = layer.mask.clone()
    target = torch.randn(64, 64)
    x = torch.eye(64)
    (layer(x) - target.T).square().sum().backward()
    outside = layer.weight.grad.masked_select(mask == 0)
    assert outside.eq(0).all() and layer.scores.gt(0).all()
    largest = layer.scores.masked_fill(mask[::16, ::16] > 0, 0).flatten().argmax().item()
    moment = torch.ones(64, 64)
    assert layer.move(0.25, [moment]) == 1
    assert layer.mask.sum() == mask.sum() and layer.mask[::16, ::16].flatten()[largest] == 1
    row, col = divmod(largest, 4)
    block = (slice(16 * row, 16 * row + 16), slice(16 * col, 16 * col + 16))
    assert layer.weight[block].eq(0).all() and moment[block].eq(0).all()


def test_groups_hold_every_parameter_once():
    for name in ("monarch", "rigl", "butterfly+low-rank"):
        model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 10))
        convert(model, name, 0.5, 16, lambda m, place: place == "0", seed=0)
        groups = groups_of(model, 1e-3, 0.1)
        held = [id(p) for g in groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert max(g["scale"] for g in groups) > 1


def test_time_to_the_same_loss():
    def record(losses, step):
        points = [{"val_loss": x, "seconds": step * i} for i, x in enumerate(losses, 1)]
        return {"curve": points}

    dense, quick = record([4.0, 2.0, 1.0], 2.0), record([4.0, 2.0, 1.5], 1.0)
    assert recipe_show.time_ratio(dense, quick) == pytest.approx(5.0 / 3.0)


def test_rates_warm_up_and_fall():
    r = rates(100)
    assert r[0] == pytest.approx(0.2) and r.max() == 1 and r[-1] < 0.01


def test_predicted_and_real_steps_are_compared(tmp_path):
    out = tmp_path / "plan.json"
    words = ["--models", "tiny", "--device", "cpu", "--quick", "--steps", "1", "--out", str(out)]
    assert plan.main([*words, "--modes", "autocast"]) == 0
    (record,) = json.loads(out.read_text())["records"]
    assert record["plan_seconds"] < 10
    for side in ("dense", "pixelfly"):
        found = record[side]
        predicted = found["autocast_predicted_ms"]
        assert predicted == pytest.approx(sum(found["autocast_parts_ms"].values()))
        ratio = predicted / found["autocast_ms"]
        assert found["autocast_error"] == pytest.approx(ratio - 1)
    again = [*words, "--modes", "bfloat16", "--cost", str(tmp_path / "plan_cost.json")]
    assert plan.main(again) == 0
