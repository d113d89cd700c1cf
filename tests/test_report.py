"""benchmarks/report.py: README tables from results files."""

from __future__ import annotations

import json

import pytest
import report

META = {"device": "GPU X", "torch": "2.11", "cuda": "13.0", "sha": "abc1234"}
OP = {
    "T": 64,
    "K": 128,
    "N": 256,
    "kind": "blocks",
    "density": 0.25,
    "dense_ms": 2.0,
    "floor_ms": 0.5,
    "ours_ms": 1.0,
    "ratio": 2.0,
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name: str, records: list[dict]) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": META, "records": records}))
        return f"before\n<!-- results:{name} -->\nold\n<!-- /results -->\nafter\n"

    return write


def test_few_tokens_table(results):
    both = [OP | {"direction": d, "ratio": x} for d, x in (("forward", 2), ("forward_backward", 3))]
    records = [*both, OP | {"direction": "forward", "T": 1}]
    text = report.render(results("few_x", records))
    assert "| K→N | pattern | 1 token | 64 tokens |" in text
    assert "| 128→256 | blocks | – | 2.00, 3.00 |" in text


def test_operator_table(results):
    records = [OP | {"direction": "forward"}, OP | {"direction": "dx"}]
    text = report.render(results("op_x", records))
    row = "| 64, 128→256 | blocks | 25 % | 2.000 | 0.500 | 1.000 | **2.00×** | – | – | – | – |"
    assert row in text
    assert "GPU X" in text and "abc1234" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert report.render(text) == text


def test_operator_table_of_a_cpu_has_no_floor(results):
    text = report.render(results("op_x", [OP | {"direction": "forward", "floor_ms": None}]))
    assert "| 64, 128→256 | blocks | 25 % | 2.000 | 1.000 | **2.00×** | – | – | – |" in text
    assert "floor" not in text


def test_profile_table(results):
    model = {"model": "vit", "mode": "compile", "form": "blocks"}
    model |= {"dense_profile_ms": {"gemm": 3.0}, "ours_profile_ms": {"gemm": 1.0, "pixelfly": 1.25}}
    text = results("models_x", [model]).replace("models_x", "models_x profile")
    row = "| vit | compile | blocks | 3.0 → 1.0 | 0.0 → 1.2 | 0.0 → 0.0 |"
    assert row in report.render(text) and report.render(report.render(text)) == report.render(text)


def test_model_table(results):
    model = {"model": "vit", "mode": "compile", "form": "blocks", "batch": "8 images", "ratio": 1.5}
    sizes = {"params": 2e6, "ms": 3.0, "mem_gb": 1.0, "ideal_ms": 2.5}
    model |= {f"{side}_{key}": value for side in ("dense", "ours") for key, value in sizes.items()}
    graphed = model | {"graph_ratio": 1.75, "dense_joules": 9.0, "ours_joules": 6.0}
    text = report.render(results("models_x", [model, graphed]))
    row = "| vit (8 images) | compile | blocks | 2.0 → 2.0 M | 3.0 | 3.0 | **1.50×** |"
    row += " 2,667 → 2,667 |"
    assert f"{row} – | 2.5 → 2.5 | 1.0 → 1.0 GB | – |" in text
    assert f"{row} 1.75× | 2.5 → 2.5 | 1.0 → 1.0 GB | 9.0 → 6.0 J |" in text


def test_tokens_a_second():
    assert report.per_second("8 x 1024 tokens", 4.0) == "2,048,000"


def test_recipe_table_of_several_seeds(results):
    run = {"task": "vit", "pattern": "dense", "params": 2e6, "test_loss": 0.5, "step_ms": None}
    first, second = run | {"seed": 1, "test_accuracy": 0.8}, run | {"seed": 2, "test_accuracy": 0.9}
    better = run | {"pattern": "ours", "seed": 1, "test_accuracy": 0.9, "test_loss": 0.4}
    text = report.render(results("recipe_x", [first, second, better | {"step_ms": 3.0}]))
    ours = "| vit | ours | 2.00 M | 1 | 90.00 % | 0.400 | 3.00 |\n"
    assert f"{ours}| vit | dense | 2.00 M | 1, 2 | 85.00 % (80.00–90.00) | 0.500 | – |" in text


def test_training_table(results):
    record = {"name": "ours", "accuracy": 0.9, "params": 2e6, "macs": 3e6, "step_ms": 4.0}
    text = report.render(results("train_x", [record]))
    assert "| ours | 90.00 % | 2.00 M | 3 M | 4.00 |" in text


LRA = {
    "task": "text",
    "mode": "speed",
    "batch": 32,
    "length": 1000,
    "kinds": {
        "scores": {"ms": 12.0, "peak_gb": 3.0},
        "sdpa": {"ms": 9.0, "peak_gb": 2.0},
        "pixelfly": {"ms": 8.0, "peak_gb": 1.0},
    },
    "ratio_scores": 1.5,
    "ratio_sdpa": 1.125,
}


def test_lra_table_of_steps_alone(results):
    text = report.render(results("lra_x", [LRA]))
    assert "| dense, scores in memory: ms a step | dense, fused | ours | to scores | to " in text
    row = "| text (32 x 1000) | 12.0, 3.0 GB | 9.0, 2.0 GB | 8.0, 1.0 GB | **1.50×** | **1.12×** |"
    assert row in text


def test_lra_table_with_graphs_and_the_published_baseline(results, tmp_path):
    kinds = {"scores_eager": {"ms": 20.0, "graph_ms": 16.0, "peak_gb": 4.0}} | {
        kind: found | {"graph_ms": found["ms"] - 7} for kind, found in LRA["kinds"].items()
    }
    kinds["scores"] = LRA["kinds"]["scores"] | {"graph_ms": None, "graph_error": "x"}
    ratios = {"ratio_scores_eager": 16.0, "ratio_sdpa": 2.0, "graphed": ["scores_eager", "sdpa"]}
    cut_off = LRA | {"task": "image", "kinds": {"scores_eager": {"error": "x"}}}
    cut_off |= {f"ratio_{kind}": None for kind in ("scores_eager", "scores", "sdpa")}
    means = {"scores_eager": {"ratio": 16.0, "tasks": 1, "graphed": 1}}
    marked = results("lra_x", [])
    content = {"meta": META, "records": [LRA | {"kinds": kinds} | ratios, cut_off], "means": means}
    (tmp_path / "lra_x.json").write_text(json.dumps(content))
    text = report.render(marked)
    assert "eager (as published): ms a step, in a graph | dense, scores in memory, comp" in text
    assert (
        "| text (32 x 1000) | 20.0 → 16.0, 4.0 GB | 12.0 → –, 3.0 GB | 9.0 → 2.0, 2.0 GB "
        "| 8.0 → 1.0, 1.0 GB | **16.00×** | **1.50×** (steps) | **2.00×** |" in text
    )
    assert "| image (32 x 1000) | – | – | – | – | – | – | – |" in text
    assert "| mean (of tasks) |  |  |  |  | **16.00×** (1) | – | – |" in text


def test_missing_results_leave_the_table_empty(results):
    text = "<!-- results:op_none -->\nold\n<!-- /results -->\n"
    assert report.render(text) == "<!-- results:op_none -->\n<!-- /results -->\n"


def test_readme_is_up_to_date():
    readme = (report.ROOT / "README.md").read_text()
    assert report.render(readme) == readme
