"""What this installation was built with."""

from __future__ import annotations

from typing import Any


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
