"""`method=dkd`: decoupled distillation of class probabilities (Zhao et al. 2022, arXiv 2203.08679).

Of an image with the true class t let p be the teacher's softened probabilities, p̂ those of the other classes
alone, which sum to 1, and q, q̂ the student's. KL(p ‖ q) falls into two parts (equation 6):

    KL(p ‖ q) = KL([p_t, 1 − p_t] ‖ [q_t, 1 − q_t]) + (1 − p_t)·KL(p̂ ‖ q̂)

So the surer the teacher, the less its student hears of the other classes. Weighed apart (equation 7) they are

    L_transfer = T²·(target_weight·KL([p_t, 1 − p_t] ‖ [q_t, 1 − q_t]) + non_target_weight·KL(p̂ ‖ q̂))

The paper calls the weights α and β. Its total is L_class + L_transfer, whose terms count as they do at
alpha = 0.5, where alpha weighs the class loss. T² and the mean over images are its released code's, in which
L_transfer also grows over the first 20 epochs; here it does not.

Shapes: S stacked students (absent for one), B batch, C classes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import check, check_positive
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.methods.maps.losses import MASKED, kl_divergence
from vitkd.models import Model, Output, Taps
from vitkd.models.output import at_least_float32


class DecoupledObjective(Objective):
    """Compares the probability of the true class, and those of the others among themselves."""

    teacher_taps = Taps()
    curves = "target_loss", "non_target_loss"

    def __init__(self, temperature: float, target_weight: float, non_target_weight: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.target_weight, self.non_target_weight = target_weight, non_target_weight

    @property
    def stack_key(self) -> Any:
        return type(self), self.temperature, self.target_weight, self.non_target_weight

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        p, q = (
            decoupled(at_least_float32(each.answer) / self.temperature, batch.label)
            for each in (teacher, student)
        )
        scale = self.temperature**2
        return {
            "target_loss": scale * kl_divergence(p.target, q.target).unsqueeze(-1),
            "non_target_loss": scale * kl_divergence(p.others, q.others).unsqueeze(-1),
        }

    def transfer(self, terms: Terms) -> Tensor:
        target, others = terms["target_loss"].squeeze(-1), terms["non_target_loss"].squeeze(-1)
        return self.target_weight * target + self.non_target_weight * others


class Decoupled(NamedTuple):
    """The log-probabilities of both parts."""

    target: Tensor
    """[*S, B, 2]: of the true class, and of all others together"""
    others: Tensor
    """[*S, B, C]: of each class if it is not the true one, which is `MASKED`"""


def decoupled(logits: Tensor, label: Tensor) -> Decoupled:
    """The parts of the logits [*S, B, C] of images whose true classes are `label` [B] or [*S, B]."""
    is_target = label.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    log_p = logits.log_softmax(-1)
    of_target = log_p.masked_fill(~is_target, 0).sum(-1)
    # Not log(1 − p_t): of a sure model that is log 0.
    of_others = log_p.masked_fill(is_target, MASKED).logsumexp(-1)
    others = logits.masked_fill(is_target, MASKED).log_softmax(-1)
    return Decoupled(torch.stack([of_target, of_others], -1), others)


@dataclass
class DKD(Method):
    """The student learns labels and its teacher's class probabilities, those of the wrong classes apart."""

    temperature: float = 4.0
    target_weight: float = 1.0
    """of the true class against all others, the paper's α"""
    non_target_weight: float = 8.0
    """of the other classes among themselves, the paper's β"""

    ignores = "granularity", "loss"
    why_unmixed = "method=dkd weighs an image's true class apart from the others, and mixed images have two"

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        for name in ("target_weight", "non_target_weight"):
            check(self, name, 0 <= getattr(self, name) < math.inf, "must be a finite number, 0 or more")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> DecoupledObjective:
        return DecoupledObjective(self.temperature, self.target_weight, self.non_target_weight)
