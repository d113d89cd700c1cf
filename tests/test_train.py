"""benchmarks/train.py end to end on the CPU: results, interruption, resumption, clear errors."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
TESTS = pathlib.Path(__file__).resolve().parent
# transformers beside a CPU torch, see vision_ops.py; then the program as it would run by itself:
# its folder is first in the path, not the current one, whose source tree may lack the library.
RUN = (
    f"import runpy, sys; sys.path[:1] = [{str(BENCHMARKS)!r}, {str(TESTS)!r}]; import vision_ops; "
    f"sys.argv[0] = {str(BENCHMARKS / 'train.py')!r}; runpy.run_path(sys.argv[0], None, '__main__')"
)
SMALL = ["--device", "cpu", "--width", "64", "--layers", "1", "--batch", "16", "--density", "0.5"]


def start(
    *options: object, script: pathlib.Path = BENCHMARKS / "train.py", processes: int = 0
) -> subprocess.Popen:
    """Starts train.py, or a script around it; under torchrun if `processes` says how many."""
    path = os.pathsep.join(p for p in (str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")) if p)
    if not list((BENCHMARKS.parent / "pixelfly").glob("_C*")):
        path = os.environ.get("PYTHONPATH", "")  # the installed package has the library
    program = ["-c", RUN] if "--text" in options else [str(script)]
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        program = [*torchrun, str(processes), *program]
    return subprocess.Popen(
        [sys.executable, *program, *SMALL, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


def train(*options: object, code: int = 0, **launch: Any) -> str:
    process = start(*options, **launch)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def checkpoint(folder: pathlib.Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Weights, optimizer state and history agree to the bit; times differ."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    for name in ("dense", "pixelfly"):
        left, right = a["learners"][name], b["learners"][name]
        assert left["history"] == right["history"]
        assert len(left["step_seconds"]) == len(right["step_seconds"])
        assert left["peak_bytes"] == right["peak_bytes"]
        for key, value in left["model"].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, right["model"][key]), key
        for parameter, state in left["optimizer"]["state"].items():
            for key, value in state.items():
                other = right["optimizer"]["state"][parameter][key]
                assert torch.equal(value, other), (parameter, key)


def test_stopped_and_resumed_equals_unbroken(tmp_path):
    options = ["--steps", 24, "--eval-every", 6]
    train(*options, "--out", tmp_path / "whole")
    # Stop away from an evaluation, twice.
    output = train(*options, "--out", tmp_path / "parts", "--stop-after", 8, code=130)
    assert "stopped after step 8" in output and checkpoint(tmp_path / "parts")["step"] == 8
    train(*options, "--out", tmp_path / "parts", "--resume", "--stop-after", 15, code=130)
    assert "resumed at step 15" in train(*options, "--out", tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    result = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert [r["name"] for r in result["records"]] == ["dense", "pixelfly"]
    dense, ours = result["records"]
    assert ours["params"] < dense["params"] and ours["macs"] < dense["macs"]
    assert min(ours["step_ms"], ours["memory_mb"], ours["accuracy"]) > 0
    assert [h["step"] for h in ours["history"]] == [6, 12, 18, 24]
    assert (tmp_path / "parts" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_interrupt_leaves_a_checkpoint(tmp_path):
    """A real Ctrl-C, at whatever step it falls, then --resume: the end is that of an unbroken
    run."""
    options = ["--steps", 120, "--eval-every", 10]
    process = start(*options, "--out", tmp_path / "broken")
    deadline = time.monotonic() + 120
    while not (tmp_path / "broken" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "--resume goes on" in output
    stopped = checkpoint(tmp_path / "broken")["step"]
    assert 10 <= stopped < 120
    train(*options, "--out", tmp_path / "broken", "--resume")
    train(*options, "--out", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_damaged_checkpoints_are_refused_and_kept(tmp_path):
    train("--steps", 6, "--stop-after", 2, "--out", tmp_path, code=130)
    file = tmp_path / "checkpoint.pt"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        file.write_bytes(damaged)
        output = train("--steps", 6, "--resume", "--out", tmp_path, code=1)
        assert "is damaged or no checkpoint" in " ".join(output.split())
        assert "Traceback" not in output and file.read_bytes() == damaged
    torch.save([1, 2], file)
    assert "another version" in train("--steps", 6, "--resume", "--out", tmp_path, code=1)


def test_killed_while_writing_a_checkpoint(tmp_path):
    """The previous checkpoint survives a kill at any point of the next one's writing."""
    train("--steps", 6, "--stop-after", 2, "--out", tmp_path, code=130)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code = (
        f"import sys, os, signal, pathlib; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import torch, training\n"
        "def half(content, file): file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "torch.save = half\n"
        f"training.write_whole(pathlib.Path({str(tmp_path / 'checkpoint.pt')!r}), {{}})"
    )
    command = [sys.executable, "-c", code]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert "resumed at step 2" in train("--steps", 6, "--resume", "--out", tmp_path)


def test_text(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "text"
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.txt").write_text(f"the quick brown fox {part} jumps. " * 200)
    options = ["--length", 32, "--steps", 6, "--lowrank", "global"]
    output = train("--text", folder, *options, "--out", tmp_path / "run", "--amp")
    assert "perplexity" in output and "accuracy" not in output
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["records"][1]["params"] < result["records"][0]["params"]


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 20), ("val", 4)):
        for label, level in (("dark", 40), ("light", 210)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40, 30 + i), (level, level, level)).save(folder / f"{i}.png")
    data = f"imagefolder:{tmp_path / 'images'}"
    train("--data", data, "--image-size", 32, "--steps", 6, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["records"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], "--data: expected digits, fashion-mnist, cifar10 or imagefolder"),
        (["--data", "imagefolder:/nowhere"], "one folder of images per class"),
        (["--text", "/nowhere"], "expected a text file or a folder of them"),
        (["--patch-size", "3"], "--patch-size: expected a divisor of the image's side 8, got 3"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--eval-every", "0"], "--eval-every: expected at least 1, got 0"),
        (["--patch-size", "-2"], "--patch-size: expected at least 1, got -2"),
        (["--device", "foo"], "--device: expected cpu, cuda or cuda:<number>, got foo"),
        (["--resume"], "there is no checkpoint"),
        (["--block-size", "48"], "block_size must be 16, 32, 64 or 128, got 48"),
        (["--density", "0.001"], "could be converted"),
    ],
)
def test_clear_errors(tmp_path, options, message):
    process = start("--out", tmp_path / "run", *options)
    output = " ".join(process.communicate(timeout=120)[0].split())
    assert process.returncode not in (0, 130)
    assert message in output and "Traceback" not in output


def test_resume_with_other_options_is_refused(tmp_path):
    train("--steps", 4, "--out", tmp_path, "--stop-after", 2, code=130)
    output = train("--steps", 5, "--out", tmp_path, "--resume", code=1)
    assert "--steps was 4, now 5" in output


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    options = ["--steps", 4, "--out", tmp_path]
    train(*options, "--stop-after", 2, code=130)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    output = " ".join(train(*options, code=1).split())
    assert "interrupted after 2 of 4 steps; go on with it by --resume" in output
    assert "Traceback" not in output and (tmp_path / "checkpoint.pt").read_bytes() == before
    train(*options, "--resume")
    train(*options)  # a finished one may be


@pytest.fixture
def build(monkeypatch):
    """networks.build of a timm model by name and patch size, on the digits' images."""
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    networks = importlib.import_module("networks")

    def build(model: str, patch_size: int | None = None) -> torch.nn.Module:
        args = argparse.Namespace(seed=0, text=None, model=model, patch_size=patch_size)
        return networks.build(args, (1, 8, 8), 10)

    return build


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [
        ("mixer_s32_224", 2),
        ("resmlp_12_224", 4),
        ("gmlp_ti16_224", 2),
        ("vit_tiny_patch16_224", 2),
        ("resnet10t", None),
    ],
)
def test_timm_models_on_small_images(build, name, patch_size):
    model = build(name, patch_size)
    assert model.training and model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    if patch_size:
        stem = model.stem if hasattr(model, "stem") else model.patch_embed
        assert stem.patch_size == (patch_size, patch_size)


@pytest.mark.parametrize(
    ("name", "patch_size", "message"),
    [
        ("vit_tiny_patch16_224", None, "of 8x8 with --patch-size not set .*; set --patch-size to"),
        ("mixer_s32_224", None, "of 8x8 with --patch-size not set .*; set --patch-size to a div"),
        ("resnet10t", 2, "--patch-size 2 .*'patch_size'.*; leave --patch-size out"),
        ("convmixer_768_32", 2, "--patch-size 2 .*'patch_size'.*; leave --patch-size out"),
        ("vit_tiny_patch16_224", 3, "expected a divisor of the image's side 8, got 3"),
        ("vit_tiny", None, r"or a timm name \(near it: vit_.*\), got vit_tiny"),
        ("mixr", None, r"or a timm name \(near it: mixer.*\), got mixr"),
        ("qqqq", None, r"or a timm name \(timm.list_models\(\) returns them\), got qqqq"),
    ],
)
def test_timm_models_that_do_not_work(build, name, patch_size, message):
    with pytest.raises(SystemExit, match=message):
        build(name, patch_size)
