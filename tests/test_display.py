"""benchmarks/display.py with rich and without."""

from __future__ import annotations

import sys

import pytest
from display import print_table, progress_bar


@pytest.fixture(params=["rich", "plain"])
def library(request, monkeypatch):
    if request.param == "rich":
        pytest.importorskip("rich")
    else:
        for name in ("rich.progress", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    return request.param


def test_progress_and_table(library, capsys):
    with progress_bar() as progress:
        task = progress.add_task("training", total=40, completed=4)
        for step in range(4, 41):
            progress.update(task, completed=step, description=f"loss {step}")
        progress.console.print("half way")
        print_table(progress.console, "models", ["name", "ms"], [["dense", "12.5"], ["ours", "7"]])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "half way" in lines
    assert any("dense" in line and line.rstrip("│ ").endswith("12.5") for line in lines)
    if library == "plain":
        assert "40/40 loss 40" in lines
        assert sum("/40" in line for line in lines) == 19  # not one for each step


def test_progress_survives_an_exception(library):
    with pytest.raises(KeyError), progress_bar():
        raise KeyError
