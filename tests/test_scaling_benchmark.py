"""benchmarks/scaling.py on the CPU: every row measured, a failed one alone lost."""

from __future__ import annotations

import json

import pytest
import scaling
import scaling_worker
import torch.distributed as dist

TINY = ["--models", "tiny", "--device", "cpu", "--processes", "1", "2", "--steps", "2"]
TINY += ["--block-size", "16", "--rank", "16", "--batch", "4"]


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [*TINY, "--density", "0.5", "--out", str(tmp_path / "scaling.json")]
    assert scaling.main([*options, "--parallel", "ddp"]) == 0
    data = json.loads((tmp_path / "scaling.json").read_text())
    rows = {(r["processes"], r["parallel"], r["form"]): r for r in data["records"]}
    assert len(rows) == 4, data
    for (processes, parallel, form), r in rows.items():
        assert r["tokens_per_s"] > 0 and r["efficiency"] > 0 and r["batch"] == 4 * processes
        assert (r["ratio_to_dense"] == 1) == (form == "dense")
        assert ("communication_share" in r) == (parallel == "ddp")
    assert rows[1, None, "factored"]["params"] < rows[1, None, "dense"]["params"]
    assert rows[2, "ddp", "factored"]["params"] == rows[1, None, "factored"]["params"]
    assert "training over processes" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    options += ["--processes", "2", "--forms", "factored", "--parallel", "fsdp2", "tp"]
    assert scaling.main(options) == 0
    fsdp, tp = json.loads((tmp_path / "scaling.json").read_text())["records"]
    assert (fsdp["batch"], tp["batch"]) == (8, 4), "tp splits the layers, not the batch"
    assert fsdp["params"] == tp["params"] == rows[1, None, "factored"]["params"]


def test_a_failed_row_leaves_the_others(tmp_path, capsys):
    """No layer can keep so little; dense is measured all the same."""
    options = [*TINY, "--processes", "1", "--density", "0.001", "--out", str(tmp_path / "s.json")]
    assert scaling.main(options) == 1
    dense, ours = json.loads((tmp_path / "s.json").read_text())["records"]
    assert dense["tokens_per_s"] > 0 and "tokens_per_s" not in ours
    assert "no layer of tiny could be converted" in ours["error"]
    assert "tiny factored on 1 failed" in " ".join(capsys.readouterr().out.split())


def test_a_row_that_hangs_is_ended(tmp_path):
    options = [*TINY, "--processes", "1", "--forms", "dense", "--limit", "0"]
    assert scaling.main([*options, "--out", str(tmp_path / "s.json")]) == 1
    assert "longer than 0 s" in json.loads((tmp_path / "s.json").read_text())["records"][0]["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes: expected"),
        (["--fixed", "total", "--batch", "5"], "--batch: expected a multiple of 2 processes"),
        (["--models", "gpt5"], "invalid choice"),
        (["--graph"], "--graph: CUDA graphs need --device cuda"),
    ],
)
def test_clear_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        scaling.parse([*TINY, *options])
    assert message in capsys.readouterr().err


def test_communication_hidden_behind_computation_is_not_exposed():
    communication, compute = [(0, 4), (3, 6), (10, 12)], [(1, 2), (5, 11)]
    assert scaling_worker.exposed(communication, []) == 8
    assert scaling_worker.exposed(communication, compute) == 1 + 3 + 1


def test_the_cause_of_a_failure_is_its_first_error():
    output = "noise\n[rank1]: Traceback\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\nx"
    assert scaling.cause(output) == "torch.OutOfMemoryError: CUDA out of memory."
    assert scaling.cause("") == "it wrote nothing"
