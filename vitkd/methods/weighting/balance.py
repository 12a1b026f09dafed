"""A weighting by gradients: both terms pull at the weights in a set ratio.

Shapes: S stacked students (absent for one).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.weighting.base import Weighting


@dataclass
class GradientBalance(Weighting):
    """`weighting=gradient_balance`: the class weight w brings the terms' gradients to a set ratio.

    (1 − w)·‖∇L_transfer‖ = ratio·w·‖∇L_class‖, solved at every logged step, where both norms are measured
    anyway, and kept until the next. alpha is the class weight until the first.
    """

    ratio: float = 1.0
    """of the transfer loss's weighted gradient norm to the class loss's"""

    needs_gradients = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf:
            raise ConfigError(f"ratio={self.ratio}: must be a finite number above 0")

    def balanced(self, class_norm: Tensor, transfer_norm: Tensor) -> Tensor:
        weight = transfer_norm / (transfer_norm + self.ratio * class_norm)
        # Where neither term pulls there is no ratio.
        return torch.where(weight.isfinite(), weight, 0.5)
