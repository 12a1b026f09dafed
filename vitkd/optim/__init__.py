"""Optimisers, and rates as functions of the step."""

from vitkd.optim.optimizers import AdamW, trained_by
from vitkd.optim.schedules import Constant, Schedule, WarmupCosine

__all__ = ["AdamW", "Constant", "Schedule", "WarmupCosine", "trained_by"]
