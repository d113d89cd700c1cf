"""Spends a budget of density, FLOPs, parameters or time on a model's layers."""

from .cost import GPUS, CostModel
from .count import count
from .kinds import layer_type
from .planner import plan
from .rate import Rate, Work
from .result import LayerPlan, Plan, Prediction

__all__ = [
    "GPUS",
    "CostModel",
    "LayerPlan",
    "Plan",
    "Prediction",
    "Rate",
    "Work",
    "count",
    "layer_type",
    "plan",
]
