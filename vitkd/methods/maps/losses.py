"""What makes two attention maps alike: one tiny class a loss, each its own configuration schema.

A loss turns teacher scores into a `target`, then compares student scores with it map by map. It returns one
value per image and student map and leaves weighing them to the caller, so that one head, one block, the whole
encoder and many stacked students are the same computation on other data.

Shapes: S stacked students (absent for one), B batch, P student maps, N tokens.
Student scores [*S, B, P, Q, K]; target [B, P, Q, K]; result [*S, B, P]. A plain ViT has Q = K = N.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitkd.errors import check_choice, check_positive
from vitkd.methods.maps.alignment import resized_weights
from vitkd.models.output import at_least_float32

# Stands for −∞ where attention is masked: exp() of it is exactly 0, and 0 times it is not NaN.
MASKED = -1e30


@dataclass
class AttentionLoss(ABC):
    """A mean over queries (and keys, for scores) of each map; never `batchmean`."""

    reduction: str = "mean"
    """Over the chosen maps: `mean`, so that alpha means the same at every granularity, `sum`, or
    `sum_blocks`, each block's mean over its maps, summed over blocks."""

    def __post_init__(self) -> None:
        check_choice(self, "reduction", ("mean", "sum", "sum_blocks"))

    @property
    def gradient_key(self) -> tuple[Any, ...]:
        """Equal for losses whose gradients by the student's scores are equal."""
        return type(self), *asdict(self).values()

    @abstractmethod
    def target(self, teacher_scores: Tensor) -> Tensor:
        """The teacher's maps as this loss compares them, in at least float32."""

    @abstractmethod
    def average(self, targets: Tensor, dim: int) -> Tensor:
        """Several teacher maps' targets along `dim` as one target."""

    @abstractmethod
    def resize(self, target: Tensor, matrix: Tensor) -> Tensor:
        """The target on another token grid; `matrix` [N', N] interpolates tokens, its rows sum to 1."""

    @abstractmethod
    def __call__(self, student_scores: Tensor, target: Tensor, allowed: Tensor | None = None) -> Tensor:
        """One value per image and map [*S, B, P]; `allowed` [Q, K] marks what counts (None: all)."""


@dataclass
class MSE(AttentionLoss):
    """Mean of (S − T)² on the scores before the softmax (the report's equations 2.8 and 2.9)."""

    center: str = "none"
    """`row` subtracts each row's mean from both, which the softmax ignores and the squared error does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "center", ("none", "row"))

    def target(self, teacher_scores: Tensor) -> Tensor:
        return at_least_float32(teacher_scores)

    def average(self, targets: Tensor, dim: int) -> Tensor:
        return targets.mean(dim)

    def resize(self, target: Tensor, matrix: Tensor) -> Tensor:
        return matrix @ target @ matrix.mT

    def __call__(self, student_scores: Tensor, target: Tensor, allowed: Tensor | None = None) -> Tensor:
        difference = at_least_float32(student_scores) - target
        if allowed is None:
            if self.center == "row":
                difference = difference - difference.mean(-1, keepdim=True)
            return difference.square().mean((-2, -1))
        difference = difference.masked_fill(~allowed, 0)
        if self.center == "row":
            row_mean = difference.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True).clamp(min=1)
            difference = (difference - row_mean).masked_fill(~allowed, 0)
        return difference.square().sum((-2, -1)) / allowed.sum()


@dataclass
class DistributionLoss(AttentionLoss):
    """Compares each query's distribution over keys; the target holds the teacher's log-probabilities."""

    temperature: float = 1.0
    """Divides teacher and student scores alike before the softmax. No T² factor is applied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "temperature")

    def target(self, teacher_scores: Tensor) -> Tensor:
        return self.softened(teacher_scores).log_softmax(-1)

    def average(self, targets: Tensor, dim: int) -> Tensor:
        return targets.logsumexp(dim) - math.log(targets.shape[dim])

    def resize(self, target: Tensor, matrix: Tensor) -> Tensor:
        weights = resized_weights(target.exp(), matrix)
        return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()

    def __call__(self, student_scores: Tensor, target: Tensor, allowed: Tensor | None = None) -> Tensor:
        scores = self.softened(student_scores)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, MASKED)
            target = target.masked_fill(~allowed, MASKED).log_softmax(-1)
        return self.rows(scores.log_softmax(-1), target).mean(-1)

    def softened(self, scores: Tensor) -> Tensor:
        """The scores divided by the temperature, in at least float32."""
        scores = at_least_float32(scores)
        if isinstance(self.temperature, Tensor):
            # Of stacked students, [S, 1, 1, 1, 1]. It stays there: a CUDA graph cannot copy from the host.
            self.temperature = self.temperature.to(scores)
        elif self.temperature == 1:
            return scores
        return scores / self.temperature

    @abstractmethod
    def rows(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """One value a query [*S, B, P, N] from student log q and teacher log p [*S, B, P, N, N]."""


@dataclass
class CE(DistributionLoss):
    """−Σ p log q (equation 2.10). Its student gradient is `KL`'s: they differ by the teacher's entropy."""

    @property
    def gradient_key(self) -> tuple[Any, ...]:
        return KL(**asdict(self)).gradient_key

    def rows(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return -(log_p.exp() * log_q).sum(-1)


@dataclass
class KL(DistributionLoss):
    """KL(p‖q) = Σ p (log p − log q), in nats a row (equation 2.11, with the divergence's sign)."""

    def rows(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return kl_divergence(log_p, log_q)


@dataclass
class ReverseKL(DistributionLoss):
    """KL(q‖p) = Σ q (log q − log p): the student avoids looking where the teacher does not."""

    def rows(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return kl_divergence(log_q, log_p)


@dataclass
class JS(DistributionLoss):
    """Jensen–Shannon divergence, ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2 (Lin 1991); at most log 2."""

    def rows(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q) over the last axis, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
