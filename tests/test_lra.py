"""The Long Range Arena benchmark: its generators against hand-checked cases, and a toy run."""

from __future__ import annotations

import json
import math
import random

import lra
import lra_data
import numpy as np
import pytest
import torch
from lra_model import SIZES, build


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 2 ]", 1),  # 1.5 rounded down
        ("[MED 3 9 5 ]", 5),
        ("[MED 2 8 3 9 ]", 5),  # (3 + 8) / 2
        ("[SM 9 8 7 ]", 4),
        ("[SM [MAX 1 6 ] [MED 4 [MIN 8 3 ] 9 ] 5 ]", 5),  # 6 + 4 + 5
    ],
)
def test_listops_values(expression, value):
    assert lra_data.listops_value(expression.split()) == value


def test_listops_trees_keep_the_rules():
    draw = random.Random(3)
    trees = [lra_data.listops_tree(draw) for _ in range(8000)]
    assert sum(len(t) > 1 for t in trees) / len(trees) == pytest.approx(0.25, abs=0.025)
    for tokens in trees:
        depth, arguments = 0, [0]
        for token in tokens:
            if token == "]":
                assert 2 <= arguments.pop() <= 10
                depth -= 1
                continue
            arguments[-1] += 1
            if token in lra_data.OPERATORS:
                depth += 1
                assert depth <= 9  # numbers alone at depth 10
                arguments.append(0)
        assert depth == 0


def test_listops_set():
    data = lra_data.listops(12, 4, seed=1, length=90, shortest=20)
    again = lra_data.listops(12, 4, seed=1, length=90, shortest=20)
    x, y = data.train(torch.arange(12), torch.Generator())
    assert torch.equal(x, again.train(torch.arange(12), torch.Generator())[0])
    assert data.test(torch.arange(4))[0].shape == (4, 90)
    for row, value in zip(x.tolist(), y.tolist(), strict=True):
        tokens = [lra_data.TOKENS[i] for i in row if i]
        assert 20 < len(tokens) < 90 and row[len(tokens) :] == [0] * (90 - len(tokens))
        assert lra_data.listops_value(tokens) == value


def test_pathfinder_keeps_the_rules():
    draw, p = random.Random(0), lra_data.Paths()
    labels = []
    for _ in range(40):
        snakes, markers, label = lra_data.path_example(draw, p)
        labels.append(label)
        assert snakes[0].shape == snakes[1].shape == (p.dashes, 2, 2)
        # Hand check of the label: which snake does each marker lie on the end of?
        on = [
            next(i for i in (0, 1) if any(np.allclose(m, e) for e in (snakes[i][0, 0],
                 snakes[i][-1, 1])))
            for m in markers
        ]  # fmt: skip
        assert (on[0] == on[1]) == bool(label)
        for i, a in enumerate(snakes):
            assert a.min() >= p.padding and a.max() <= p.size - p.padding
            lengths = np.linalg.norm(a[:, 1] - a[:, 0], axis=-1)
            gaps = np.linalg.norm(a[1:, 0] - a[:-1, 1], axis=-1)
            assert np.allclose(lengths, p.dash) and np.allclose(gaps, p.gap)
            for b in snakes[:i]:
                between = lra_data._points(a)[:, None] - lra_data._points(b)[None]
                assert np.linalg.norm(between, axis=-1).min() >= p.gap + p.thickness - 1e-9
    assert 8 < sum(labels) < 32


def test_turns_follow_the_cosine_law():
    draw = random.Random(0)
    turns = np.array([lra_data.turn(draw, 1.8) for _ in range(4000)])
    assert np.abs(turns).max() <= math.pi / 3.6
    # Half of cos**2 on [-pi/2, pi/2] and its first lobe: (1/2 + 1/pi) of the mass is within pi/4.
    within = np.mean(np.abs(1.8 * turns) < math.pi / 4)
    assert within == pytest.approx(0.5 + 1 / math.pi, abs=0.03)


def test_a_dash_and_a_marker_are_drawn_where_they_are():
    p = lra_data.Paths(size=8, thickness=1.0, marker_radius=1.0)
    dash = np.array([[[2.5, 1.5], [2.5, 4.5]]])
    image = lra_data.draw_picture([dash], [np.array([6.5, 6.5])], p)
    assert image[2, 1:5].tolist() == [1.0] * 4 and image[2, 5] == 0 and image[4].max() == 0
    assert image[6, 6] == 1 and image[6, 5] == pytest.approx(0.5) and image[6, 4] == 0


def test_pathfinder_set_is_seeded():
    a, b = (lra_data.pathfinder(3, 2, seed=5) for _ in range(2))
    xa, ya = a.train(torch.arange(3), torch.Generator())
    xb, yb = b.train(torch.arange(3), torch.Generator())
    assert torch.equal(xa, xb) and torch.equal(ya, yb)
    assert xa.shape == (3, 1024) and 200 < xa.max() <= 255


def test_generated_data_is_kept(tmp_path, monkeypatch):
    made, name = lra_data.load("listops", tmp_path, 3, 2, 4)
    monkeypatch.setitem(lra_data.GENERATED, "listops", (None, name))  # would raise if called again
    kept, _ = lra_data.load("listops", tmp_path, 3, 2, 4)
    assert (kept.num_train, kept.num_test, kept.classes) == (3, 2, made.classes)
    for part in (lambda d: d.test(torch.arange(2)), lambda d: d.train(torch.arange(3), None)):
        assert all(torch.equal(a, b) for a, b in zip(part(made), part(kept), strict=True))
    assert [p.name for p in (tmp_path / "lra").iterdir()] == ["listops-3-2-4.npz"]


def test_kinds_agree_where_all_scores_are_kept():
    size = SIZES["toy"]
    models = [build(kind, size, 0.5, 128).eval() for kind in ("scores", "sdpa")]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(1, 16, (3, 96))
    ids[0, 50:] = 0
    a, b = (model(ids) for model in models)
    torch.testing.assert_close(a, b)
    cut = models[0](ids[:1, :50])
    torch.testing.assert_close(a[:1], cut)  # padding is seen by nobody
    ours = build("pixelfly", size, 0.5, 16).eval()
    torch.testing.assert_close(ours(ids)[:1, :], ours(ids[:1]))
    with pytest.raises(ValueError, match="kind must be one of"):
        build("linear", size, 0.5, 16)


@pytest.mark.parametrize("task", [name for name in SIZES if name != "toy"])
def test_standard_sizes_have_layers_of_the_default_density(task):
    model = build("pixelfly", SIZES[task], 0.5, 64)
    if SIZES[task].width < 256:
        assert type(model.blocks[0].fc1) is torch.nn.Linear
    else:
        assert 0.4 < model.blocks[0].fc1.density <= 0.5


@pytest.mark.parametrize("mode", ["speed", "train"])
def test_toy_run(mode, tmp_path, capsys):
    out = tmp_path / "lra.json"
    options = f"--mode {mode} --tasks toy --device cpu --steps 2 --attention-block 16 --out {out}"
    lra.main([*options.split(), *(["--seeds", "0", "7"] if mode == "train" else [])])
    record, *others = json.loads(out.read_text())["records"]
    kinds = {"speed": {"scores", "sdpa", "pixelfly"}, "train": {"sdpa", "pixelfly"}}[mode]
    assert set(record["kinds"]) == kinds
    for found in record["kinds"].values():
        assert found["ms"] > 0 and found["peak_gb"] > 0 and found["params"] > 0
    if mode == "speed":
        assert record["ratio_scores"] > 0 and record["ratio_sdpa"] > 0
    else:
        assert [record["seed"], *(r["seed"] for r in others)] == [0, 7]
        assert record["steps_done"] == 2 and 0 <= record["kinds"]["sdpa"]["accuracy"] <= 1
    assert "toy" in capsys.readouterr().out


def test_tasks_without_data_say_so():
    with pytest.raises(SystemExit, match="text: has no data here"):
        lra.main(["--mode", "train", "--tasks", "text", "--device", "cpu"])
