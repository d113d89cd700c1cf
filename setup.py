"""Builds pixelfly._C: host planner, operator schemas and, where nvcc is found, the CUDA kernels.

Environment:
    PIXELFLY_FORCE_CUDA=1   fail if nvcc is missing instead of building the CPU package
    PIXELFLY_CPU_ONLY=1     skip the CUDA kernels
    TORCH_CUDA_ARCH_LIST    e.g. "8.0;9.0a"; default "8.0;9.0a+PTX"; what is below 8.0 is left out
    MAX_JOBS                parallel compilers; default: the number of cores
    PIXELFLY_BUILD_LOG      file that receives the kernels' register and spill report
    CUDA_HOME               toolkit to use; default: the one nvcc on PATH belongs to

The kernels do not depend on torch, and the operators only on torch's stable ABI, so one build
serves every torch from 2.11 on, CPU or CUDA, and compiles where there is no GPU.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11
DEFAULT_ARCHS = "8.0;9.0a+PTX"
OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 8)
OLDEST_ARCH = (8, 0)


def toolkit_of(nvcc: str) -> pathlib.Path:
    """The toolkit nvcc belongs to; asked of nvcc, which may be a wrapper or a link."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", text)
    return pathlib.Path(top[1] if top else pathlib.Path(nvcc).parent.parent).resolve()


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_nvcc() -> str | None:
    """Path of nvcc, or None for a CPU build."""
    if flag("PIXELFLY_CPU_ONLY"):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = str(pathlib.Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc and os.path.exists(nvcc):
        return nvcc
    if flag("PIXELFLY_FORCE_CUDA"):
        raise SystemExit(
            "PIXELFLY_FORCE_CUDA=1 but nvcc was not found: put the CUDA toolkit's bin folder on "
            "PATH or set CUDA_HOME"
        )
    print(
        "pixelfly: nvcc was not found, so this is a CPU-only build: everything runs, on the CPU.\n"
        "pixelfly: for the CUDA kernels install the CUDA toolkit (12.8 or newer), put nvcc on\n"
        "pixelfly: PATH, and run: PIXELFLY_FORCE_CUDA=1 pip install --force-reinstall --no-deps .",
        file=sys.stderr,
    )
    return None


def architectures() -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for, without what is older than the kernels.

    Lists meant for torch itself (as container images set them) often begin below 8.0.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    archs = [arch for arch in re.split(r"[; ,]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", arch):
            raise SystemExit(
                "pixelfly: TORCH_CUDA_ARCH_LIST must list architectures such as 8.0 or 9.0a+PTX, "
                f"got {arch!r}"
            )
    supported = [arch for arch in archs if numbers(arch) >= OLDEST_ARCH]
    if not supported:
        raise SystemExit(
            "pixelfly: TORCH_CUDA_ARCH_LIST must name an architecture from 8.0 on, got "
            f"{text!r}: older GPUs have no kernels; PIXELFLY_CPU_ONLY=1 builds without them"
        )
    return supported


def gencode(source: str) -> list[str] | None:
    """nvcc's target flags for one file; None if no requested architecture wants it.

    Files named *_sm90* use Hopper-only instructions and are compiled for sm_90a alone. The others
    serve every GPU from sm_80 on; "+PTX" (or the newest architecture) lets later GPUs run them.
    """
    archs = architectures()
    if "_sm90" in pathlib.Path(source).name:
        hopper = any(a.startswith("9.0") for a in archs)
        return ["-gencode=arch=compute_90a,code=sm_90a"] if hopper else None
    flags = []
    for arch in archs:
        number = re.sub(r"[^0-9]", "", arch.removesuffix("+PTX"))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def launch_sources() -> list[pathlib.Path]:
    """The launchers of the requested architectures; stand-ins for Hopper's if it is not one."""
    sources = sorted(ROOT.glob("csrc/launch/*.cpp")) + sorted(ROOT.glob("csrc/launch/*.cu"))
    if gencode("_sm90.cu"):
        return [path for path in sources if path.name != "without_sm90.cpp"]
    return [path for path in sources if not path.match("*_sm90.cu")]


def numbers(version: str) -> tuple[int, int]:
    """Major and minor of "2.11.0+cpu"."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def check_torch(version: str) -> None:
    if numbers(version) < OLDEST_TORCH:
        raise SystemExit(
            f"pixelfly: torch must be 2.11 or newer, got {version}: run `pip install -U torch`"
        )


def check_nvcc(nvcc: str, release: str) -> None:
    if numbers(release) < OLDEST_NVCC:
        raise SystemExit(
            f"pixelfly: nvcc must be 12.8 or newer, got {release} ({nvcc}): install a newer CUDA "
            "toolkit and set CUDA_HOME to it, or set PIXELFLY_CPU_ONLY=1"
        )


def find_compiler() -> str:
    """The C++ compiler's command, which may carry a launcher or flags ("ccache g++")."""
    command = os.environ.get("CXX", "c++")
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise SystemExit(
            f"pixelfly: the C++ compiler {command!r} was not found: install one (Debian, Ubuntu: "
            "`apt install g++`) or set CXX"
        )
    return command


def sdist_files() -> list[str]:
    """What a build and the tests need beside the Python package; setuptools puts `depends` into the
    sdist."""
    kinds = (".h", ".cuh", ".cpp", ".cu", ".py", ".sh", ".md", ".txt", ".json")
    folders = ("csrc", "tests", "benchmarks")
    files = [p for top in folders for p in ROOT.glob(f"{top}/**/*") if p.suffix in kinds]
    return ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in files)]


def find_ninja() -> str:
    """The program of the Python package, or one on PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise SystemExit(
            "pixelfly: the build needs ninja: run `pip install ninja`, or build without "
            "--no-build-isolation"
        )
    return found


def find_package(name: str) -> tuple[pathlib.Path, str]:
    """Folder and version of an installed package, which is not imported: the build reads torch's
    headers, and a torch whose CUDA libraries are not installed has them too."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"pixelfly: the build needs {name}: run `pip install {name}`, or build without "
            "--no-build-isolation"
        )
    return pathlib.Path(spec.origin).parent, importlib.metadata.version(name)


class NinjaBuild(build_ext):
    """Writes a build.ninja for the one extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        ninja = find_ninja()
        torch_home, torch_version = find_package("torch")
        pybind11_home, _ = find_package("pybind11")
        check_torch(torch_version)
        cxx = find_compiler()

        work = pathlib.Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        python_include = os.environ.get("PIXELFLY_PYTHON_INCLUDE", sysconfig.get_path("include"))
        ours = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        theirs = [
            f"-isystem{path}"
            for path in (python_include, pybind11_home / "include", torch_home / "include")
        ]
        defines = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f'-DPIXELFLY_VERSION=\\"{VERSION}\\"',
            f'-DPIXELFLY_TORCH_VERSION=\\"{torch_version}\\"',
        ]
        link = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ldl", "-lpthread"]
        sources = sorted(ROOT.glob("csrc/planner/*.cpp")) + [
            ROOT / "csrc/module.cpp",
            ROOT / "csrc/torch/library.cpp",
        ]
        if nvcc:
            home = toolkit_of(nvcc)
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release ([\d.]+)", text)[1]
            check_nvcc(nvcc, release)
            theirs.append(f"-isystem{home / 'include'}")
            defines += ["-DPIXELFLY_WITH_CUDA", "-DUSE_CUDA"]
            defines += [f'-DPIXELFLY_CUDA_VERSION=\\"{release}\\"']
            archs = ";".join(architectures())
            defines += [f"-DPIXELFLY_ARCHS='\"{archs}\"'"]
            link += [f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart_static", "-lrt"]
            sources += sorted(ROOT.glob("csrc/torch/*.cpp")) + launch_sources()
        sources = list(dict.fromkeys(sources))

        cflags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        nvflags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        nvflags += ["-Xptxas", "-v", "--expt-relaxed-constexpr"]
        lines = [
            "ninja_required_version = 1.3",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {' '.join(cflags + defines + ours + theirs)} "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {nvcc} -MD -MF $out.d {' '.join(nvflags + ours)} $arch -c $in -o $out "
            "> $out.log 2>&1 || (cat $out.log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -s $in -o $out {' '.join(link)}",
        ]
        objects = []
        for source in sources:
            name = work / (str(source.relative_to(ROOT)).replace(os.sep, "_") + ".o")
            if source.suffix == ".cu":
                target = " ".join(gencode(str(source)) or [])
                lines += [f"build {name}: nvcc {source}", f"  arch = {target}"]
            else:
                lines.append(f"build {name}: cxx {source}")
            objects.append(str(name))
        lines.append(f"build {output}: link {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja, "-C", str(work)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode:
            raise SystemExit("pixelfly: the extension did not compile; the errors are above")
        if os.environ.get("PIXELFLY_BUILD_LOG"):
            logs = "".join(path.read_text() for path in sorted(work.glob("*.cu.o.log")))
            pathlib.Path(os.environ["PIXELFLY_BUILD_LOG"]).write_text(logs)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("pixelfly._C", sources=[], depends=sdist_files())],
        cmdclass={"build_ext": NinjaBuild},
    )
