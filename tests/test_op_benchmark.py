"""benchmarks/op.py and op_plots.py on the CPU: the records' keys, the studies, the plots."""

from __future__ import annotations

import json
import sys

import cases
import kernel_profile
import op
import op_plots
import pytest


def run(monkeypatch, tmp_path, *options: str) -> dict:
    out = tmp_path / "op_cpu.json"
    argv = ["op.py", "--device", "cpu", "--dtype", "float32", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    op.main()
    return json.loads(out.read_text())


def test_every_kind_and_direction(monkeypatch, tmp_path):
    options = ["--shapes", "33x128x256", "--block-size", "16", "--rank", "16"]
    records = run(monkeypatch, tmp_path, *options)["records"]
    assert {(r["kind"], r["direction"]) for r in records} == {
        (kind, direction) for kind in cases.KINDS for direction in cases.DIRECTIONS
    }
    for r in records:
        assert r["error"] is None and r["dense_ms"] > 0 and r["ours_ms"] > 0
        if r["direction"] == "forward":
            assert r["error_ratio"] < 2
    assert {r["kind"]: r["rank"] for r in records} == {"blocks": 0, "factored": 16, "global": 16}


def test_peers_and_activation(monkeypatch, tmp_path):
    options = ["--shapes", "16x128x128", "--block-size", "32", "--kinds", "blocks", "--peers"]
    options += ["--directions", "forward", "--activation", "relu"]
    monkeypatch.setattr(op, "compiled_dense", lambda layer: layer)  # compiling takes a while
    (record,) = run(monkeypatch, tmp_path, *options)["records"]
    assert record["epilogue"] == "bias+relu"
    assert {"dense_compiled", "gather_bmm"} <= set(record["peers"])


def test_studies_are_well_formed():
    """Every layout of every study exists, and the kinds of a group tell its cases apart."""
    for name, study in cases.STUDIES.items():
        groups = study()
        assert groups and all(group.study == name for group in groups)
        for group in groups:
            kinds = [case.kind for case in group.cases]
            assert len(set(kinds)) == len(kinds)
            for case in group.cases:
                assert 0 < case.density <= 1
                forward, both = map(case.floor_ms, cases.BOTH)
                assert both == pytest.approx(3 * forward) and forward > 0


def test_plots(tmp_path):
    record = {
        "dense_ms": 2.0, "ours_ms": 1.0, "T": 64, "K": 128, "N": 128, "kind": "blocks",
        "density": 0.5, "floor_fraction": 0.5,
    }  # fmt: skip
    records = [
        record | {"study": study, "T": t, "ratio": ratio, "direction": direction}
        for study in ("table", "tokens", "width", "density")
        for direction in ("forward", "forward_backward", "dx")
        for t, ratio in ((1, 0.5), (3, 1.5))
    ]
    path = tmp_path / "op_x.json"
    path.write_text(json.dumps({"meta": {"device": "GPU X"}, "records": records}))
    assert op_plots.main([str(path)]) == 0
    assert len(list(tmp_path.glob("op_x_*.png"))) == 4
    with pytest.raises(SystemExit):
        op_plots.main([])


def test_crossover():
    assert op_plots.crossover([(1, 0.5), (3, 1.5)]) == 2
    assert op_plots.crossover([(1, 1.5), (3, 2)]) is None


def test_counters_of_ncu_are_told_apart_by_case():
    names = ["gpu__time_duration.sum", "dram__bytes_read.sum"]
    metrics = dict(zip(("us", "dram_read_mb"), zip(names, (1e3, 1e6), strict=True), strict=True))
    mark = '"0","void at::cuda::spin_kernel(long)","900","0"'
    ours = '"1","void pixelfly::product_sm90<__nv_bfloat16, 0>(Args)","1,500","2,000,000"'
    other = '"2","void pixelfly::reduce_weight_grad_sm90<float>(Args)","500","0"'
    header = '"ID","Kernel Name","' + '","'.join(names) + '"'
    lines = ["==PROF== noise", header, '"","","ns","byte"', mark, ours, other, mark, ours]

    def parse(*lines: str) -> list[list[dict]]:
        return kernel_profile.parse("\n".join(lines), kernel_profile.OURS, metrics)

    product = {"kernel": "product_sm90", "us": 1.5, "dram_read_mb": 2}
    reduction = {"kernel": "reduce_weight_grad_sm90", "us": 0.5, "dram_read_mb": 0}
    assert parse(*lines) == [[product, reduction], [product]]
    with pytest.raises(SystemExit, match="no kernel named"):
        parse(*lines, mark)
    with pytest.raises(SystemExit, match="no table"):
        parse("==ERROR== no permission")
