"""Weightings by the epoch: the class weight moves from `alpha` in the first epoch to `end` in the last."""

import math
from dataclasses import dataclass

from vitkd.errors import ConfigError
from vitkd.methods.weighting.base import Weighting


@dataclass
class EpochWeighting(Weighting):
    """The class weight is alpha + (end − alpha)·progress, where progress goes from 0 to 1."""

    end: float = 1.0
    """the class weight of the last epoch; 1 ends with the labels alone"""

    def __post_init__(self) -> None:
        if not 0 <= self.end <= 1:
            raise ConfigError(f"end={self.end}: must lie in [0, 1]; it is the last epoch's class weight")

    def distils(self, alpha: float) -> bool:
        return min(alpha, self.end) < 1

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        share = epoch / (epochs - 1) if epochs > 1 else 0.0
        progress = self.progress(share)
        # Exact at both ends: at a class weight of 1 the transfer loss is not computed.
        return {0.0: alpha, 1.0: self.end}.get(progress, alpha + (self.end - alpha) * progress)

    def progress(self, share: float) -> float:
        """How far the weight has moved, in [0, 1], when `share` of the epochs has passed."""
        return share


class Linear(EpochWeighting):
    """`weighting=linear`: the class weight moves in equal steps."""


class Cosine(EpochWeighting):
    """`weighting=cosine`: the class weight moves by half a cosine, slowly at both ends."""

    def progress(self, share: float) -> float:
        return {0.0: 0.0, 1.0: 1.0}.get(share, (1 - math.cos(math.pi * share)) / 2)


@dataclass
class Step(EpochWeighting):
    """`weighting=step`: the class weight changes from alpha to `end` at once."""

    at: float = 0.5
    """the share of all epochs after which it changes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.at < 1:
            raise ConfigError(f"at={self.at}: must lie between 0 and 1; it is a share of all epochs")

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        return alpha if epoch < round(self.at * epochs) else self.end
