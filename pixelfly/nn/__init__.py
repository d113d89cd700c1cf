"""Modules: a drop-in for `nn.Linear` whose weight is `block butterfly + low rank`, its MLP, and
self-attention over butterfly blocks of the scores."""

from .attention import AttentionConfig, PixelflySelfAttention
from .choice import Choice, choose
from .linear import PixelflyLinear
from .mlp import PixelflyMLP
from .project import fitted_layout, magnitude_layout, project
from .split import fitted_split
from .token_mlp import TokenMLP

__all__ = [
    "AttentionConfig",
    "Choice",
    "PixelflyLinear",
    "PixelflyMLP",
    "PixelflySelfAttention",
    "TokenMLP",
    "choose",
    "fitted_layout",
    "fitted_split",
    "magnitude_layout",
    "project",
]
