"""Optimisers, and rates as functions of the step."""

from vitkd.optim.optimizers import AdamW
from vitkd.optim.schedules import Constant, Schedule, WarmupCosine

__all__ = ["AdamW", "Constant", "Schedule", "WarmupCosine"]
