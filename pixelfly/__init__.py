"""Linear layers whose weight is flat block butterfly + low rank, with hand-written CUDA kernels."""

from __future__ import annotations

try:
    import torch  # noqa: F401  before _C, which needs torch's libraries loaded

    from . import _C  # noqa: F401
except (ImportError, OSError) as error:  # torch raises OSError where a library of its own is gone
    from . import collect_env
    from ._build import load_failure

    if collect_env.asked_for():
        collect_env.main()
        raise SystemExit(0) from None
    raise ImportError(load_failure(error)) from error

from . import budget, masks, nn, ntk, ops, patterns, pretrained
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
    "pretrained",
    "sparsify_",
]
