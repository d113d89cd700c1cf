"""benchmarks/parity.py: kernels and reference train alike, and a wrong operator is noticed."""

from __future__ import annotations

import json

import parity
import pytest

pytest.importorskip("sklearn")
SMALL = "--device cpu --width 64 --layers 1 --batch 8 --density 0.5 --steps 20".split()


@pytest.mark.parametrize("options", [[], ["--amp"]])
def test_same_losses(tmp_path, options):
    assert parity.main([*SMALL, *options, "--out", str(tmp_path)]) == 0
    outcome = json.loads((tmp_path / "parity.json").read_text())
    assert len(outcome["curves"]["kernels"]) == 20


def test_another_operator_is_noticed(tmp_path, monkeypatch):
    exact = parity.butterfly_lowrank_mm_reference

    def wrong(*args, **kwargs):
        return 0.9 * exact(*args, **kwargs)

    monkeypatch.setattr(parity, "butterfly_lowrank_mm_reference", wrong)
    assert parity.main([*SMALL, "--out", str(tmp_path)]) == 1
