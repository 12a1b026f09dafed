"""Optimisers, and rates as functions of the step."""

from vitkd.optim.groups import Place, grouped, places
from vitkd.optim.optimizers import SGD, AdamW, Lion, Optimizer, trained_by
from vitkd.optim.schedules import Constant, Schedule, WarmupCosine

__all__ = [
    "SGD",
    "AdamW",
    "Constant",
    "Lion",
    "Optimizer",
    "Place",
    "Schedule",
    "WarmupCosine",
    "grouped",
    "places",
    "trained_by",
]
