"""The operators: `butterfly_lowrank_mm` with its registrations, `butterfly_qkv`,
`butterfly_attention`, specifications, `short_attention`, `add_layer_norm` and
`linear_cross_entropy`."""

from __future__ import annotations

import torch

from .. import _C  # noqa: F401 (loading it defines the operators' schemas)
from . import autograd, cpu, cross_entropy, layer_norm, qkv, rounding, token_mlp
from . import short_attention as _short_attention
from .attention import butterfly_attention, butterfly_attention_reference
from .cross_entropy import linear_cross_entropy
from .explain import Explanation, explain
from .functional import butterfly_lowrank_mm
from .layer_norm import add_layer_norm
from .mlp import Weights, butterfly_mlp
from .qkv import butterfly_qkv
from .reference import butterfly_lowrank_mm_reference
from .short_attention import short_attention

__all__ = [
    "Explanation",
    "Weights",
    "add_layer_norm",
    "butterfly_attention",
    "butterfly_attention_reference",
    "butterfly_lowrank_mm",
    "butterfly_lowrank_mm_reference",
    "butterfly_mlp",
    "butterfly_qkv",
    "explain",
    "linear_cross_entropy",
    "short_attention",
]

# Registrations live as long as this object.
_library = torch.library.Library("pixelfly", "IMPL")
cpu.register(_library)
autograd.register(_library)
qkv.register(_library)
layer_norm.register(_library)
rounding.register(_library)
token_mlp.register(_library)
cross_entropy.register(_library)
_short_attention.register(_library)
