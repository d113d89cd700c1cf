"""Prints what a bug report needs: `python -m pixelfly.collect_env`, whether pixelfly loads or not.

Python imports the package first, and that ends where the compiled library does not load: there
`pixelfly/__init__.py` prints this report itself. So this module needs nothing but the standard
library.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys


def asked_for() -> bool:
    """Whether this process is `python -m pixelfly.collect_env`."""
    return sys.orig_argv[-2:] == ["-m", "pixelfly.collect_env"]


def _last_line(*command: str) -> str:
    """The last line a program prints, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return (done.stdout.strip().splitlines() or [f"unknown (exit status {done.returncode})"])[-1]


def _toolkit() -> dict[str, str]:
    """The nvcc that a build would take, as in setup.py, and the variables that steer builds."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(pathlib.Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    found = nvcc is not None and os.path.exists(nvcc)
    out = {"nvcc": f"{nvcc}, {_last_line(nvcc, '--version')}" if found else "not found"}
    out["CUDA_HOME"] = home or "not set"
    for name in sorted(os.environ):
        if name.startswith("PIXELFLY_") or name == "TORCH_CUDA_ARCH_LIST":
            out[name] = os.environ[name]
    return out


def collect() -> dict[str, str]:
    """Returns versions and devices, as text; never raises for something that is missing."""
    out = {"platform": platform.platform(), "python": sys.version.split()[0]}
    for name in ("torch", "numpy", "triton", "timm", "transformers"):
        try:
            out[name] = importlib.import_module(name).__version__
        except Exception as error:  # a broken package is worth reporting, not crashing on
            out[name] = f"not importable ({type(error).__name__})"
    out["pixelfly in"] = str(pathlib.Path(__file__).resolve().parent)
    from pixelfly._build import build_info, load_failure

    try:
        for key, value in build_info().items():
            out[f"pixelfly {key}"] = str(value)
    except ImportError as error:
        out["pixelfly"] = f"does not load: {load_failure(error)}"
    out.update(_toolkit())
    try:
        import torch

        out["torch cuda"] = str(torch.version.cuda)
        if torch.cuda.is_available():
            query = ("--query-gpu=driver_version", "--format=csv,noheader")
            out["NVIDIA driver"] = _last_line("nvidia-smi", *query)
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            out[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 20} MiB"
    except Exception as error:
        out["torch cuda"] = f"unknown ({type(error).__name__}: {error})"
    return out


def main() -> None:
    for key, value in collect().items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
