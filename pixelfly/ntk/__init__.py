"""Neural tangent kernels: how near a sparse model is to the dense one before any training."""

from .kernel import Distance, distance, kernel
from .search import Entry, Ranking, search

__all__ = ["Distance", "Entry", "Ranking", "distance", "kernel", "search"]
