"""The Long Range Arena benchmark: its generators against hand-checked cases, and a toy run."""

from __future__ import annotations

import dataclasses
import json
import random

import lra
import lra_data
import lra_plots
import pytest
import torch
from feeds import SequenceFeed
from lra_model import SIZES, build, sinusoids, z_order


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
    x, y = data.train
    assert torch.equal(x, again.train[0]) and data.test[0].shape == (4, 90)
    for row, value in zip(x.tolist(), y.tolist(), strict=True):
        tokens = [lra_data.TOKENS[i] for i in row if i]
        assert 20 < len(tokens) < 90 and row[len(tokens) :] == [0] * (90 - len(tokens))
        assert lra_data.listops_value(tokens) == value


def test_generated_data_is_kept(tmp_path, monkeypatch):
    made, name = lra_data.load("listops", tmp_path, 3, 2, 4)
    # A generator that would raise if called again.
    monkeypatch.setitem(lra_data.GENERATED, "listops", (None, name, "listops"))
    kept, _ = lra_data.load("listops", tmp_path, 3, 2, 4)
    assert kept.classes == made.classes and len(kept.train[1]) == 3 and len(kept.test[1]) == 2
    for a, b in zip((*made.train, *made.test), (*kept.train, *kept.test), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in (tmp_path / "lra").iterdir()] == ["listops-3-2-4.npz"]


def test_places_of_pixels():
    places = sinusoids(1024, 64)
    assert places.square().mean() == pytest.approx(1)
    near = places @ places.T
    by_row = near[32 * 10 + 10].view(32, 32)
    assert by_row.argmax() == 32 * 10 + 10
    assert (
        by_row[10, 11] == pytest.approx(by_row[11, 10].item()) and by_row[10, 11] > by_row[10, 13]
    )
    model = build("sdpa", SIZES["pathfinder"], 0.5, 64)
    assert torch.equal(model.places, places[z_order(1024)])


def test_blocks_of_pixels_are_square():
    order = z_order(1024)
    assert torch.equal(order.sort().values, torch.arange(1024))
    for block in order.view(16, 64):
        y, x = block // 32, block % 32
        assert y.max() - y.min() == 7 and x.max() - x.min() == 7
    with pytest.raises(ValueError, match="square number of pixels, got 24"):
        z_order(24)


def test_order_of_pixels_is_nothing_to_dense_attention():
    """Pictures row by row and their places in the same order give what those in z_order give."""
    size = dataclasses.replace(SIZES["pathfinder"], length=64)
    ids, labels = torch.randint(256, (2, 64)), torch.zeros(2)
    order = z_order(64)
    data = lra_data.Sequences((ids, labels), (ids[:1], labels[:1]), 2).reordered(order)
    assert torch.equal(data.train[0][:, order.argsort()], ids) and len(data.test[0]) == 1
    model = build("sdpa", size, 0.5, 16).eval()
    expected = model(data.train[0])
    model.places.data = sinusoids(64, 64)
    torch.testing.assert_close(model(ids), expected)


def test_kinds_agree_where_all_scores_are_kept():
    size = SIZES["toy"]
    models = [build(kind, size, 0.5, 128).eval() for kind in ("scores", "sdpa")]
    assert build("sdpa_cudnn", size, 0.5, 128).state_dict().keys() == models[0].state_dict().keys()
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
        assert found["ms"] > 0 and found["params"] > 0
    if mode == "speed":
        assert record["ratio_scores"] > 0 and record["ratio_sdpa"] > 0
        assert all(found["peak_gb"] > 0 for found in record["kinds"].values())
    else:
        assert [record["seed"], *(r["seed"] for r in others)] == [0, 7]
        assert record["steps"] == 2 and 0 <= record["kinds"]["sdpa"]["accuracy"] <= 1
        assert [point["step"] for point in record["kinds"]["sdpa"]["curve"]] == [1, 2]
    assert "toy" in capsys.readouterr().out


@pytest.mark.gpu
def test_training_replays_a_graph(tmp_path):
    out = tmp_path / "lra.json"
    options = f"--mode train --tasks toy --steps 8 --attention-block 64 --out {out}"
    lra.main(options.split())
    (record,) = json.loads(out.read_text())["records"]
    for found in record["kinds"].values():
        assert found["ms"] > 0 and found["peak_gb"] > 0 and not found["diverged"]


def test_training_goes_on_where_it_was_stopped(tmp_path, capsys):
    out = tmp_path / "lra.json"
    options = "--mode train --tasks toy --device cpu --steps 2 --attention-block 16 --add --out"
    lra.main([*options.split(), str(out), "--kinds", "sdpa"])
    first = json.loads(out.read_text())["records"][0]
    lra.main([*options.split(), str(out), "--seeds", "0", "1"])
    again, other = json.loads(out.read_text())["records"]
    assert "toy seed 0 sdpa: kept" in capsys.readouterr().out
    assert list(again["kinds"]) == list(other["kinds"]) == ["sdpa", "pixelfly"]
    assert again["kinds"]["sdpa"] == first["kinds"]["sdpa"]
    with pytest.raises(SystemExit):
        lra.main([*options.split(), str(out), "--kinds", "scores_eager"])


def test_dropout_is_in_training_alone(tmp_path, capsys):
    model = build("pixelfly", SIZES["toy"], 0.5, 16, dropout=0.5)
    ids = torch.randint(1, 16, (3, 96))
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
    out = tmp_path / "lra.json"
    train = f"--mode train --tasks toy --device cpu --steps 2 --attention-block 16 --out {out}"
    lra.main([*train.split(), "--dropout", "0.1"])
    (record,) = json.loads(out.read_text())["records"]
    assert record["dropout"] == 0.1 and record["kinds"].keys() == {"sdpa", "pixelfly"}
    for options, message in (
        (f"{train} --dropout 1", "expected at least 0 and less than 1, got 1"),
        ("--tasks toy --device cpu --dropout 0.1", "--dropout needs --mode train"),
    ):
        with pytest.raises(SystemExit):
            lra.main(options.split())
        assert message in capsys.readouterr().err


def test_sequences_that_validate_do_not_train():
    x = torch.arange(40).repeat(3, 1).T
    feed = SequenceFeed((x, x[:, 0] % 7), (x[:5], x[:5, 0]), torch.device("cpu"))
    feed.plan(9, 4, seed=1)
    trained = torch.cat([feed.batch(torch.tensor([step]))[0][:, 0] for step in range(9)])
    held = torch.cat([x[:, 0] for x, _ in feed.batches("val")])
    assert len(held) == 4 and sorted(set(trained.tolist()) | set(held.tolist())) == list(range(40))
    tested = torch.cat([y for _, y in feed.batches("test")])
    assert tested.dtype == torch.long and tested.tolist() == list(range(5))


TOY = "--mode speed --tasks toy --device cpu --steps 2 --attention-block 16"


@pytest.fixture
def toy(tmp_path):
    """Runs the toy task in speed mode, nothing really compiled, and returns the file's content."""
    out = tmp_path / "lra.json"

    def run(*options: str) -> dict:
        with torch.compiler.set_stance("force_eager"):
            lra.main([*TOY.split(), "--compile", "--out", str(out), *options])
        return json.loads(out.read_text())

    run.out = out
    return run


def test_compiled_speed_has_the_published_baseline_beside_it(toy, monkeypatch):
    compiled = {}
    real = lra.Learner
    monkeypatch.setattr(
        lra,
        "Learner",
        lambda name, model, s: compiled.update({name: s.compile}) or real(name, model, s),
    )
    data = toy()
    assert compiled == {"scores_eager": False, "scores": True, "sdpa": True, "pixelfly": True}
    (record,) = data["records"]
    assert list(record["kinds"]) == list(compiled) and record["graphed"] == []
    for kind, found in record["kinds"].items():
        assert ("compile_s" in found) == compiled[kind]
    assert set(data["means"]) == {"scores_eager", "scores", "sdpa"}
    assert data["means"]["sdpa"] == {"ratio": record["ratio_sdpa"], "tasks": 1, "graphed": 0}
    assert not torch._inductor.config.max_autotune  # left as it was


def test_add_measures_only_what_is_missing(toy, monkeypatch, capsys):
    first = toy("--kinds", "sdpa")
    assert first["records"][0]["ratio_sdpa"] is None and first["means"] == {}
    measured = []
    real = lra.measure
    monkeypatch.setattr(lra, "measure", lambda kind, *a: measured.append(kind) or real(kind, *a))
    (record,) = toy("--add")["records"]
    assert measured == ["scores_eager", "scores", "pixelfly"]
    assert "toy sdpa: kept" in capsys.readouterr().out
    assert record["kinds"]["sdpa"] == first["records"][0]["kinds"]["sdpa"]
    assert record["ratio_sdpa"] > 0
    content = json.loads(toy.out.read_text())
    content["records"][0]["kinds"]["scores"] = {"error": "OutOfMemoryError: x"}
    toy.out.write_text(json.dumps(content))
    assert "ms" in toy("--add")["records"][0]["kinds"]["scores"]
    assert measured[3:] == ["scores"]
    assert len(toy("--add", "--batch", "2")["records"]) == 2  # other options, another row
    content["meta"]["sha"] = "another"
    toy.out.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="its rows cannot be kept"):
        toy("--add")


def test_every_kind_is_written_as_soon_as_it_is_measured(toy, monkeypatch):
    real = lra.measure

    def cut_off(kind, *rest):
        if kind == "sdpa":
            raise KeyboardInterrupt
        return real(kind, *rest)

    monkeypatch.setattr(lra, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        toy()
    (record,) = json.loads(toy.out.read_text())["records"]
    assert list(record["kinds"]) == ["scores_eager", "scores"]


def test_a_kind_that_fails_is_a_row(toy):
    """cuDNN has no attention on a CPU."""
    record = toy("--kinds", "sdpa_cudnn", "pixelfly")["records"][0]
    assert "error" in record["kinds"]["sdpa_cudnn"] and record["ratio_sdpa_cudnn"] is None
    assert record["kinds"]["pixelfly"]["ms"] > 0


def no_gpu(monkeypatch, captured):
    def timed(step, steps):
        step()
        return {"ms": 2.0, "joules": steps / 100}

    for name in ("synchronize", "empty_cache", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: "stream")
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(lra, "captured", captured)
    monkeypatch.setattr(lra, "time_cuda", timed)
    return streams


def toy_learner() -> tuple[lra.Learner, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    size = SIZES["toy"]
    settings = lra.Settings(4, size.batch, 1e-2, 0.0, 1, 4, 0, "cpu", None, False)
    learner = lra.Learner("sdpa", build("sdpa", size, 0.5, 16), settings)
    return learner, torch.randint(1, 16, (4, size.length)), torch.randint(0, 10, (4,))


def test_what_a_graph_replays_is_the_whole_step(monkeypatch):
    learner, x, y = toy_learner()

    def captured(step):
        for group in learner.optimizer.param_groups:
            assert group["capturable"]
            group["capturable"] = False  # which a CPU has no step for
        return step

    no_gpu(monkeypatch, captured)
    before = [p.detach().clone() for p in learner.model.parameters()]
    assert lra.replayed(learner, x, y) == {"graph_ms": 2.0, "graph_joules": 1.0}
    assert not any(
        torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
    assert all(p.grad is None for p in learner.model.parameters())


def test_a_capture_that_fails_is_in_the_record(monkeypatch):
    def fails(step):
        try:
            raise RuntimeError("not while capturing")
        finally:
            raise RuntimeError("the capture was invalidated")

    streams = no_gpu(monkeypatch, fails)
    found = lra.replayed(*toy_learner())
    assert found["graph_ms"] is None and streams == ["stream"]
    assert "invalidated after RuntimeError: not while capturing" in found["graph_error"]


def test_ratios_are_of_graphs_where_both_have_one():
    kinds = {
        "scores": {"ms": 12.0, "graph_ms": None, "graph_error": "x"},
        "sdpa": {"ms": 9.0, "graph_ms": 6.0},
        "pixelfly": {"ms": 8.0, "graph_ms": 2.0},
    }
    record = {"kinds": kinds}
    lra.compare(record)
    assert record["ratio_scores"] == 1.5 and record["ratio_sdpa"] == 3.0
    assert record["graphed"] == ["sdpa"] and "ratio_scores_eager" not in record
    found = lra.means([record, {"ratio_sdpa": 5.0, "graphed": []}, {"ratio_sdpa": None}])
    assert found["sdpa"] == {"ratio": 4.0, "tasks": 2, "graphed": 1}


def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        lra.main([*TOY.split(), "--graph"])
    assert "--graph needs --mode speed and --device cuda" in capsys.readouterr().err


def test_tasks_without_data_say_so():
    with pytest.raises(SystemExit, match="text: has no data here"):
        lra.main(["--mode", "train", "--tasks", "text", "--device", "cpu"])


def test_plots_of_several_files(tmp_path, capsys):
    files = []
    for name, task, seeds in (("a", "image", (0, 1)), ("b", "pathfinder", (0,))):
        curve = [{"step": 1, "val_accuracy": 0.5}, {"step": 2, "val_loss": 0.6}]
        kinds = {"sdpa": {"ms": 2.0, "curve": curve}, "pixelfly": {"ms": 1.0, "peak_gb": 1.0}}
        records = [{"task": task, "mode": "train", "seed": s, "kinds": kinds} for s in seeds]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"meta": {"device": "GPU X"}, "records": records}))
    lra_plots.main([str(path) for path in files])
    assert (tmp_path / "a.png").stat().st_size > 0
    runs = lra_plots.merged([r for path in files for r in json.loads(path.read_text())["records"]])
    assert list(runs) == ["image 0", "image 1", "pathfinder 0"]
    data = json.loads(files[1].read_text())
    data["records"][0]["mode"] = "speed"
    files[1].write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="of one mode, got"):
        lra_plots.main([str(path) for path in files])
    (tmp_path / "a.png").unlink()
    lra_plots.main([str(files[1])])
    assert (tmp_path / "b.png").stat().st_size > 0
    with pytest.raises(SystemExit):
        lra_plots.main([])


def test_what_could_not_be_measured_is_not_drawn():
    error, found = {"error": "out of memory"}, {"ms": 3.0, "graph_ms": None}
    record = {"task": "text", "kinds": {"scores": error, "sdpa": found}}
    later = {"task": "text", "kinds": {"scores": {"ms": 5.0}, "sdpa": {"ms": 4.0}}}
    merged = lra_plots.merged([record, later])
    assert merged == {"text": {"sdpa": found, "scores": {"ms": 5.0}}}
    assert lra_plots.milliseconds(found) == 3.0
    assert lra_plots.milliseconds(found | {"graph_ms": 2.0}) == 2.0
