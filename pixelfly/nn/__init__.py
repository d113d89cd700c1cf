"""Modules: a drop-in for `nn.Linear` whose weight is `block butterfly + low rank`, and its MLP."""

from .choice import Choice, choose
from .linear import PixelflyLinear
from .mlp import PixelflyMLP
from .project import fitted_layout, magnitude_layout, project

__all__ = [
    "Choice",
    "PixelflyLinear",
    "PixelflyMLP",
    "choose",
    "fitted_layout",
    "magnitude_layout",
    "project",
]
