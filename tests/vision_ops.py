"""Import this before timm or transformers: it lets them load beside a CPU build of torch.

PyPI's torchvision is built for CUDA torch. Beside a CPU torch its library does not load, and
`import torchvision` then fails while it attaches fakes to operators that nobody defined. Defining
them is enough for models that do not call them.
"""

from __future__ import annotations

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def define_missing_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", _SCHEMA)


define_missing_operators()
