"""Optimisers, and the learning rate as a function of the step; each class is its own configuration schema."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from vitkd.errors import ConfigError, check_positive


@dataclass
class AdamW:
    """AdamW (Loshchilov and Hutter 2019), in PyTorch's fused form."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_positive(self, "lr", "eps")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay={self.weight_decay}: must be 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}: give two numbers in [0, 1)")

    def build(self, parameters: Iterable[nn.Parameter], fused: bool = True) -> torch.optim.AdamW:
        """The optimiser of `parameters`, fused where their device allows."""
        parameters = list(parameters)
        fused = fused and parameters[0].device.type in ("cpu", "cuda")
        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(parameters, self.lr, betas, self.eps, self.weight_decay, fused=fused or None)


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
