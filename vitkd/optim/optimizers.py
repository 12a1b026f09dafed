"""Optimisers; each class is its own configuration schema."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check, check_fraction, check_positive
from vitkd.optim.lion import LionOptimizer

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""parameters, or PyTorch's groups of them, each with settings of its own"""


@dataclass
class Optimizer(ABC):
    """How steps follow from gradients: what every optimiser's configuration says."""

    algorithm: ClassVar[type[torch.optim.Optimizer]]
    """PyTorch's class, or one like it"""
    why_alone: ClassVar[str | None] = "its optimizer does not say that it can train a stack"
    """why the parameters of several students cannot be one tensor; None if each entry takes a step of its
    own, whose direction depends on neither the learning rate nor a decoupled weight decay"""
    is_decoupled: ClassVar[bool] = True
    """whether weights decay by lr · weight_decay, rather than by a term of the gradient"""

    lr: float = 1e-3
    weight_decay: float = 0.01
    decay_all: bool = True
    """False leaves norms, biases, positions and tokens without weight decay."""
    layer_decay: float = 1.0
    """Layer-wise decay of the learning rate (Bao et al. 2022, BEiT): the head's is lr, that of each layer
    this share of the rate of the layer above it; 1 is the same rate for all."""

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay={self.weight_decay}: must be 0 or more")
        check_fraction(self, "layer_decay")

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What `algorithm` takes besides `lr`, `weight_decay` and `fused`."""

    def build(self, groups: Groups, fused: bool = True) -> torch.optim.Optimizer:
        """The optimiser of these parameters, fused where their device allows."""
        parameters: list[Any] = list(groups)
        first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
        fused = fused and first.device.type in ("cpu", "cuda")
        settings: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": fused or None}
        return self.algorithm(parameters, **self.arguments(), **settings)


@dataclass
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), in PyTorch's fused form."""

    algorithm = torch.optim.AdamW
    why_alone = None

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eps")
        check_betas(self)

    def arguments(self) -> dict[str, Any]:
        return {"betas": (self.betas[0], self.betas[1]), "eps": self.eps}


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's fused form: weight decay joins the gradient."""

    algorithm = torch.optim.SGD
    why_alone = None
    is_decoupled = False

    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "momentum", 0 <= self.momentum < 1, "must lie in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=true: looks ahead by momentum, which is 0; set nesterov=false")

    def arguments(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "nesterov": self.nesterov}


@dataclass
class Lion(Optimizer):
    """Lion (Chen et al. 2023): see `LionOptimizer`."""

    algorithm = LionOptimizer
    why_alone = None

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self)

    def arguments(self) -> dict[str, Any]:
        return {"betas": (self.betas[0], self.betas[1])}


def check_betas(settings: AdamW | Lion) -> None:
    """ConfigError unless there are two decay rates of moments."""
    if len(settings.betas) != 2 or not all(0 <= beta < 1 for beta in settings.betas):
        raise ConfigError(f"betas={settings.betas}: give two numbers in [0, 1)")


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimiser; a tenth of the time that a walk through the modules takes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
