"""benchmarks/attention.py on the CPU."""

from __future__ import annotations

import json
import sys

import attention
import attention_profile
import pytest


def test_records(tmp_path, monkeypatch):
    out = tmp_path / "attention.json"
    options = "--device cpu --lengths 64 100 --head-features 8 --heads 2 --tokens 128"
    options += f" --block-sizes 16 32 --rounds 2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["attention.py", *options.split()])
    attention.main()
    records = json.loads(out.read_text())["records"]
    assert [(r["length"], r["direction"]) for r in records] == [
        (length, direction) for length in (64, 100) for direction in ("forward", "forward_backward")
    ]
    for r in records:
        assert set(r["peers"]) == {"butterfly 16", "butterfly 32", "window", "sdpa"}
        assert r["dense"] == "sdpa" and r["ratio"] == r["dense_ms"] / r["ours_ms"]
        assert r["window_density"] <= r["density"]["butterfly 16"] <= 1
        assert r["ours_eager_ms"] is None  # the CPU has no graphs to compare with
    assert out.with_suffix(".png").stat().st_size > 0


def test_window_is_the_widest_within_the_density():
    layout = attention.window(160, 16, 0.5)
    assert layout.density <= 0.5
    assert attention.window(160, 16, 1.0).density == pytest.approx(1)
    assert attention.window(160, 16, 0.0).density == pytest.approx(0.1)


def test_an_error_is_recorded_and_loses_no_other_row(tmp_path, monkeypatch):
    def broken(backend):
        def call(q, k, v):
            raise RuntimeError("no kernel here")

        return call

    monkeypatch.setattr(attention, "dense", broken)
    out = tmp_path / "attention.json"
    options = "--device cpu --lengths 64 --head-features 8 --heads 2 --tokens 128"
    options += f" --block-sizes 16 --rounds 2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["attention.py", *options.split()])
    attention.main()
    for r in json.loads(out.read_text())["records"]:
        assert r["peers"]["sdpa"] == "RuntimeError: no kernel here"
        assert r["ratio"] is None and r["ours_ms"] > 0


def test_profile_tells_engines_apart(tmp_path, monkeypatch):
    """Eight groups of kernels, as ncu would give them: two lengths, two engines, two directions."""
    children = []

    def counters(child, names, metrics):
        children.append(child)
        return [[{"kernel": f"triton_{i}", "us": 1.0}] for i in range(8)]

    monkeypatch.setattr(attention_profile, "counters", counters)
    monkeypatch.setattr(attention_profile, "environment", lambda device: {"device": "GPU X"})
    out = tmp_path / "profile.json"
    options = f"--lengths 256 512 --head-features 32 --heads 2 --tokens 512 --out {out}"
    argv = ["attention_profile.py", *options.split(), "--engines", "cudnn", "butterfly 64"]
    monkeypatch.setattr(sys, "argv", argv)
    attention_profile.main()
    (child,) = children
    assert child[child.index("--tokens") + 1] == "512" and "butterfly 64" in child
    records = json.loads(out.read_text())["records"]
    assert [r["kernels"][0]["kernel"] for r in records] == [f"triton_{i}" for i in range(8)]
    dense, _, ours, backward = records[:4]
    assert dense["flop"] == 4 * 2 * 2 * 256**2 * 32  # two products of two FLOP, 2 x 2 heads
    assert ours["flop"] == dense["flop"] * ours["density"] < dense["flop"]
    assert backward["direction"] == "backward" and backward["flop"] == 2.5 * ours["flop"]
