"""Linear layers whose weight is flat block butterfly + low rank, with hand-written CUDA kernels."""

from __future__ import annotations

import pathlib

import torch

try:
    from . import _C  # noqa: F401
except ImportError as error:
    if (pathlib.Path(__file__).parent.parent / "setup.py").exists():
        raise ImportError(
            "pixelfly: this is the source tree, and its compiled library is not built here. Run "
            "`python setup.py build_ext --inplace`, or start Python in another directory to use "
            f"the installed package ({error})"
        ) from error
    raise ImportError(
        "pixelfly: the compiled library could not be loaded. It needs torch >= 2.11 "
        f"(this is torch {torch.__version__}); reinstall with "
        f"`pip install --force-reinstall --no-deps pixelfly` ({error})"
    ) from error

from . import budget, masks, nn, ntk, ops, patterns
from ._build import build_info
from .densify import densify_
from .nn import PixelflyLinear
from .param_groups import param_groups
from .sparsify import PixelflyConfig, sparsify_

__version__ = build_info()["version"]

__all__ = [
    "PixelflyConfig",
    "PixelflyLinear",
    "budget",
    "build_info",
    "densify_",
    "masks",
    "nn",
    "ntk",
    "ops",
    "param_groups",
    "patterns",
    "sparsify_",
]
