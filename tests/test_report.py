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


def test_model_table(results):
    model = {"model": "vit", "mode": "compile", "form": "blocks", "batch": "8 images", "ratio": 1.5}
    sizes = {"params": 2e6, "ms": 3.0, "mem_gb": 1.0, "ideal_ms": 2.5}
    model |= {f"{side}_{key}": value for side in ("dense", "ours") for key, value in sizes.items()}
    graphed = model | {"graph_ratio": 1.75, "dense_joules": 9.0, "ours_joules": 6.0}
    text = report.render(results("models_x", [model, graphed]))
    row = "| vit (8 images) | compile | blocks | 2.0 → 2.0 M | 3.0 | 3.0 | **1.50×** |"
    assert f"{row} – | 2.5 → 2.5 | 1.0 → 1.0 GB | – |" in text
    assert f"{row} 1.75× | 2.5 → 2.5 | 1.0 → 1.0 GB | 9.0 → 6.0 J |" in text


def test_training_table(results):
    record = {"name": "ours", "accuracy": 0.9, "params": 2e6, "macs": 3e6, "step_ms": 4.0}
    text = report.render(results("train_x", [record]))
    assert "| ours | 90.00 % | 2.00 M | 3 M | 4.00 |" in text


def test_missing_results_leave_the_table_empty(results):
    text = "<!-- results:op_none -->\nold\n<!-- /results -->\n"
    assert report.render(text) == "<!-- results:op_none -->\n<!-- /results -->\n"


def test_readme_is_up_to_date():
    readme = (report.ROOT / "README.md").read_text()
    assert report.render(readme) == readme
