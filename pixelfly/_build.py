"""What this installation was built with, and what to do if its library does not load."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

OLDEST_TORCH = (2, 11)  # whose stable ABI the library is built for


def build_info() -> dict[str, Any]:
    """Returns what the compiled library was built with.

    Returns:
        A dict: `version`; `cuda` (the toolkit's version, None for a CPU-only build); `archs` (the
        GPU architectures compiled for); `torch_headers`; `compiler`.

    Example:
        >>> import pixelfly
        >>> pixelfly.build_info()["version"]
        '0.1.0'
    """
    from . import _C

    return dict(_C.build_info())


def load_failure(error: ImportError | OSError) -> str:
    """Returns one sentence on why torch or the compiled library did not load and what cures it."""
    if "torch" not in sys.modules:  # Python takes a module out again whose import fails
        return f"pixelfly: torch does not import here; run `pip install -U torch` ({error})"
    import torch

    package = pathlib.Path(__file__).parent
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not list(package.glob("_C.*")):
        if (package.parent / "setup.py").exists():
            return (
                "pixelfly: this is the source tree, and its compiled library is not built here. "
                "Run `python setup.py build_ext --inplace`, or start Python in another directory "
                f"to use the installed package ({error})"
            )
        return (
            "pixelfly: the compiled library is missing from this installation; run "
            f"`pip install --force-reinstall --no-deps pixelfly` ({error})"
        )
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        return (
            f"pixelfly: torch must be 2.11 or newer, this is {torch.__version__}; run "
            f"`pip install -U torch` ({error})"
        )
    return (
        "pixelfly: the compiled library does not fit this machine: another Python, processor or C "
        "library than it was built for. Build it here: `pip install --force-reinstall --no-deps "
        f"--no-binary pixelfly pixelfly`, or `pip install .` in the source tree ({error})"
    )
