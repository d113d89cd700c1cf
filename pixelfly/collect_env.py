"""Prints what a bug report needs: `python -m pixelfly.collect_env`."""

from __future__ import annotations

import importlib
import platform
import sys


def collect() -> dict[str, str]:
    """Returns versions and devices, as text; never raises for something that is missing."""
    out = {"platform": platform.platform(), "python": sys.version.split()[0]}
    for name in ("torch", "numpy", "triton", "timm", "transformers"):
        try:
            out[name] = importlib.import_module(name).__version__
        except Exception as error:  # a broken package is worth reporting, not crashing on
            out[name] = f"not importable ({type(error).__name__})"
    try:
        import pixelfly

        for key, value in pixelfly.build_info().items():
            out[f"pixelfly {key}"] = str(value)
    except ImportError as error:
        out["pixelfly"] = str(error)
    try:
        import torch

        out["torch cuda"] = str(torch.version.cuda)
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            out[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 20} MiB"
    except ImportError:
        pass
    return out


if __name__ == "__main__":
    for key, value in collect().items():
        print(f"{key}: {value}")
