"""Learning-rate schedules: the rate as a function of the step; each class is its own configuration schema."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from vitkd.errors import ConfigError


@dataclass
class Schedule(ABC):
    """How the learning rate changes over a run."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """What multiplies the learning rate at optimiser step `step`, counted from 0, of `total_steps`."""


@dataclass
class Constant(Schedule):
    """The same learning rate at every step."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


@dataclass
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` (Loshchilov and Hutter 2017, without restarts)."""

    warmup: float = 0.1
    """The warm-up's share of all steps."""
    final: float = 0.0
    """What the cosine falls to, as a share of the learning rate."""

    def __post_init__(self) -> None:
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in [0, 1]")

    def factor(self, step: int, total_steps: int) -> float:
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
