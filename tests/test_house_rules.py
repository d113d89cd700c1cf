"""Rules of the source tree that reviewers should not have to remember."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
PYTHON = sorted(
    p for top in ("pixelfly", "benchmarks", "tests") for p in (ROOT / top).rglob("*.py")
)

# folder -> what its files may include besides themselves and the standard library
MAY_INCLUDE = {
    "include": (),
    "device": ("include",),
    "kernels": ("include", "device"),
    "planner": ("include",),
    "launch": ("include", "device", "kernels"),
    "torch": ("include",),
}


def relative(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def folder(path: pathlib.Path) -> str:
    """The layer a native file belongs to; module.cpp, which joins them, belongs to none."""
    return path.relative_to(CSRC).parts[0]


def test_layers_include_downwards_only():
    wrong = []
    for path in NATIVE:
        if folder(path) not in MAY_INCLUDE:
            continue
        for name in includes(path):
            target = name.split("/")[0].replace("pixelfly", "include")
            ours = target in MAY_INCLUDE and (CSRC / name).exists() or target == "include"
            if ours and target not in (folder(path), *MAY_INCLUDE[folder(path)]):
                wrong.append(f"{relative(path)} includes {name}")
    assert not wrong


def test_torch_is_seen_by_the_binding_alone():
    assert not [
        f"{relative(path)} includes {name}"
        for path in NATIVE
        for name in includes(path)
        if folder(path) != "torch" and name.startswith(("torch/", "ATen/", "c10/"))
    ]


def test_kernels_are_launched_from_launch_alone():
    elsewhere = [p for p in NATIVE if folder(p) not in ("launch", "tests")]
    assert not [relative(path) for path in elsewhere if "<<<" in path.read_text()]


def test_inline_assembly_lives_in_device_alone():
    """The emulator replaces csrc/device: PTX elsewhere could not run on it."""
    elsewhere = [p for p in NATIVE if folder(p) != "device"]
    assembly = re.compile(r"\basm\b\s*(volatile)?\s*\(")
    assert not [relative(path) for path in elsewhere if assembly.search(path.read_text())]


def test_public_headers_need_no_cuda():
    headers = (CSRC / "include").rglob("*.h")
    assert not [relative(p) for p in headers if any("cuda" in name for name in includes(p))]


def test_the_library_does_not_exit_or_print():
    words = re.compile(r"\b(exit|abort|printf)\s*\(|std::c(out|err)\b")
    library = [p for p in NATIVE if folder(p) != "tests"]
    assert not [relative(path) for path in library if words.search(path.read_text())]


def test_files_stay_readable():
    wrong = []
    for path in NATIVE + PYTHON:
        lines = path.read_text().splitlines()
        if len(lines) > 500:
            wrong.append(f"{relative(path)} has {len(lines)} lines: a file holds one idea")
        wrong += [
            f"{relative(path)}:{i} is too wide" for i, x in enumerate(lines, 1) if len(x) > 100
        ]
    assert not wrong


def test_python_files_say_what_they_hold():
    texts = {relative(path): path.read_text() for path in PYTHON}
    assert not [name for name, text in texts.items() if text and not text.startswith('"""')]


def test_the_package_does_not_need_the_benchmarks():
    for path in (ROOT / "pixelfly").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.M), relative(
            path
        )


def test_top_level_of_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.split()}
    files = {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"}
    folders = {"csrc", "pixelfly", "tests", "benchmarks"}
    assert {name for name in top if not name.startswith(".")} <= files | folders
