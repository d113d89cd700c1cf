"""Decisions of setup.py, without compiling."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest

import pixelfly

SETUP = pathlib.Path(__file__).parent.parent / "setup.py"
VARIABLES = ("PIXELFLY_FORCE_CUDA", "PIXELFLY_CPU_ONLY", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, on a machine with neither nvcc nor a compiler."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("pixelfly_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: pathlib.Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return str(path)


def test_no_nvcc_is_a_cpu_build_and_says_so(build, capsys):
    assert build.find_nvcc() is None
    assert "CPU-only build" in capsys.readouterr().err


def test_force_cuda_without_nvcc(build, monkeypatch):
    monkeypatch.setenv("PIXELFLY_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found.*CUDA_HOME"):
        build.find_nvcc()


def test_nvcc_on_path_in_cuda_home_and_skipped(build, monkeypatch, tmp_path):
    on_path = executable(tmp_path / "nvcc")
    assert build.find_nvcc() == on_path
    at_home = executable(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert build.find_nvcc() == at_home
    monkeypatch.setenv("PIXELFLY_CPU_ONLY", "1")
    assert build.find_nvcc() is None


@pytest.mark.parametrize(
    ("archs", "common", "hopper"),
    [
        (None, ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"], True),
        ("8.0", ["80,code=sm_80"], False),
        ("8.0 8.6+PTX", ["80,code=sm_80", "86,code=sm_86", "86,code=compute_86"], False),
        ("5.2;7.5 8.0;9.0 9.0a;", ["80,code=sm_80", "90,code=sm_90"], True),
    ],
)
def test_architectures(build, monkeypatch, archs, common, hopper):
    if archs is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    assert build.gencode("a_sm80.cu") == [f"-gencode=arch=compute_{flag}" for flag in common]
    assert (build.gencode("a_sm90.cu") is not None) == hopper


@pytest.mark.parametrize(("archs", "hopper"), [(None, True), ("9.0", True), ("8.0+PTX", False)])
def test_launchers_of_hopper_or_their_stand_ins(build, monkeypatch, archs, hopper):
    if archs is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    names = {path.name for path in build.launch_sources()}
    kernels = {"low_rank_sm90.cu", "product_sm90.cu", "weight_grad_sm90.cu"}
    kernels |= {"product_split_sm90.cu", "product_all_rows_sm90.cu", "short_attention_sm90.cu"}
    assert {"product.cpp", "product_sm80.cu", "tensor_map.cpp"} <= names
    assert names & (kernels | {"without_sm90.cpp"}) == (kernels if hopper else {"without_sm90.cpp"})


def test_stand_ins_are_complete():
    """A launcher without one would be an undefined symbol, seen only when the library loads."""

    def functions(path, name=r"\w+"):
        return set(re.findall(rf"^\w+ ({name})\((?!\))", path.read_text(), re.M))

    csrc = SETUP.parent / "csrc"
    declared = {name for path in csrc.glob("launch/*_sm90.h") for name in functions(path)}
    declared |= functions(csrc / "include/pixelfly/launch.h", r"\w*short_attention\w*")
    defined = functions(csrc / "launch/without_sm90.cpp")
    assert len(declared) == 18 and declared == defined


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("8.0 Hopper", "such as 8.0 or 9.0a\\+PTX, got 'Hopper'"),
        ("90a", "such as 8.0 or 9.0a\\+PTX, got '90a'"),
        ("6.0 7.5+PTX", "from 8.0 on, got '6.0 7.5\\+PTX'"),
    ],
)
def test_architectures_without_kernels(build, monkeypatch, archs, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    with pytest.raises(SystemExit, match=message):
        build.gencode("a_sm80.cu")


def test_old_torch_old_nvcc_no_compiler(build):
    build.check_torch("2.11.0+cpu")
    with pytest.raises(SystemExit, match=r"2\.11 or newer, got 2\.9\.1"):
        build.check_torch("2.9.1")
    build.check_nvcc("nvcc", "13.0")
    with pytest.raises(SystemExit, match=r"12\.8 or newer, got 12\.4"):
        build.check_nvcc("nvcc", "12.4")
    with pytest.raises(SystemExit, match="'c\\+\\+' was not found"):
        build.find_compiler()


def test_ninja_of_the_package_or_on_path(build, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ninja", None)  # cannot be imported
    with pytest.raises(SystemExit, match="the build needs ninja: run `pip install ninja`"):
        build.find_ninja()
    on_path = executable(tmp_path / "ninja")
    assert build.find_ninja() == on_path
    package = types.SimpleNamespace(BIN_DIR=str(tmp_path / "package/bin"))
    monkeypatch.setitem(sys.modules, "ninja", package)
    assert build.find_ninja() == str(tmp_path / "package/bin/ninja")


def test_packages_are_found_without_importing_them(build, monkeypatch, tmp_path):
    """The build reads torch's headers: it works where torch's CUDA libraries are not installed."""
    (tmp_path / "headers_only").mkdir()
    (tmp_path / "headers_only/__init__.py").write_text("raise OSError('libcudart.so')")
    (tmp_path / "headers_only-2.11.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: headers_only\nVersion: 2.11.0\n"
    (tmp_path / "headers_only-2.11.0.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    assert build.find_package("headers_only") == (tmp_path / "headers_only", "2.11.0")
    with pytest.raises(SystemExit, match="the build needs no_such: run `pip install no_such`"):
        build.find_package("no_such")


def test_compiler_with_a_launcher(build, monkeypatch, tmp_path):
    executable(tmp_path / "ccache")
    monkeypatch.setenv("CXX", "ccache g++")
    assert build.find_compiler() == "ccache g++"


def test_build_info_and_version(build):
    info = pixelfly.build_info()
    assert set(info) == {"version", "cuda", "archs", "torch_headers", "compiler"}
    assert pixelfly.__version__ == info["version"] == build.VERSION


@pytest.mark.parametrize(
    ("files", "torch_version", "message"),
    [
        (["setup.py"], "2.13.0", "build_ext --inplace"),
        ([], "2.13.0", "missing from this installation"),
        (["pixelfly/_C.x.so"], "2.10.1+cpu", "torch must be 2.11 or newer, this is 2.10.1"),
        (["pixelfly/_C.x.so"], "2.13.0", "another Python, processor or C library"),
    ],
)
def test_load_failures_name_the_cure(tmp_path, monkeypatch, files, torch_version, message):
    import torch

    from pixelfly import _build

    for name in ("pixelfly/_build.py", *files):
        executable(tmp_path / name)
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "pixelfly/_build.py"))
    monkeypatch.setattr(torch, "__version__", torch_version)
    text = _build.load_failure(ImportError("undefined symbol"))
    assert message in text and "undefined symbol" in text


@pytest.mark.parametrize(
    ("pattern", "replacement", "reason"),
    [
        (rb"(?<=\A.{18})..", b"\xf3\x00", "cannot open shared object file"),  # RISC-V
        (rb"\x00GLIBC_2\.\d", b"\x00GLIBC_9.9", "GLIBC_9.9\\S* not found"),
    ],
    ids=["processor", "glibc"],
)
def test_import_of_a_library_for_another_machine(tmp_path, pattern, replacement, reason):
    """What a wheel that was renamed past pip's check of its tag says: one sentence."""
    home = pathlib.Path(pixelfly.__file__).parent
    (tmp_path / "pixelfly").mkdir()
    for source in home.glob("*.py"):
        shutil.copy(source, tmp_path / "pixelfly")
    library = pathlib.Path(pixelfly._C.__file__)
    other = re.sub(pattern, replacement, library.read_bytes(), flags=re.S)
    (tmp_path / "pixelfly" / library.name).write_bytes(other)
    command = [sys.executable, "-c", "import pixelfly"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: pixelfly: "), done.stderr
    assert "does not fit this machine" in last and "pip install ." in last
    assert re.search(reason, last), last


def test_import_needs_nothing_before_it():
    """Torch's libraries are loaded by pixelfly itself."""
    code = "import pixelfly; print(pixelfly.__version__)"
    # The folder this pixelfly was imported from: the source tree's, or the installed package's.
    home = pathlib.Path(pixelfly.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.stdout.strip() == pixelfly.__version__, done.stderr


def test_import_uses_no_network():
    code = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
import pixelfly
"""
    home = pathlib.Path(pixelfly.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def collect_env(folder: pathlib.Path, **variables: str) -> dict[str, str]:
    """What `python -m pixelfly.collect_env` prints, run in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pixelfly.collect_env"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_report_of_the_environment(tmp_path):
    nvcc = executable(tmp_path / "bin/nvcc")
    pathlib.Path(nvcc).write_text("#!/bin/sh\necho nvcc\necho Build 12.8\n")
    home = pathlib.Path(pixelfly.__file__).parent
    report = collect_env(home.parent, CUDA_HOME=str(tmp_path), PIXELFLY_TEST="1")
    assert report["pixelfly version"] == pixelfly.__version__ and "pixelfly" not in report
    assert report["pixelfly in"] == str(home) and report["PIXELFLY_TEST"] == "1"
    assert report["nvcc"] == f"{nvcc}, Build 12.8" and report["CUDA_HOME"] == str(tmp_path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, "the compiled library is missing from this installation"),
        (f"pixelfly/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "does not fit this machine"),
        ("torch.py", "torch does not import here"),
    ],
)
def test_report_where_the_package_does_not_load(tmp_path, broken, message):
    """The package without its library, with a damaged one, without torch."""
    (tmp_path / "pixelfly").mkdir()
    for source in pathlib.Path(pixelfly.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path / "pixelfly")
    if broken:
        (tmp_path / broken).write_text("raise OSError('libc10.so: not found')")
    report = collect_env(tmp_path)
    assert message in report["pixelfly"] and report["pixelfly in"] == str(tmp_path / "pixelfly")
    code = "import pixelfly"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and message in done.stderr.decode()  # anyone else gets the error
