"""`method=logit`: distillation of class probabilities (Hinton, Vinyals and Dean 2015); no map is compared.

    L_transfer = T²·KL(softmax(v/T) ‖ softmax(z/T))    with the teacher's logits v and the student's z

`standardize` compares z-scores of logits instead (Sun et al. 2024, arXiv 2403.01427, algorithm 1), so that
the student learns how its teacher's logits relate, and not their range:

    Z(x) = (x − mean(x)) / std(x)    over the classes of one image

The variance is divided by C − 1, as in the released code. Its total is 0.1·L_class + 9·L_transfer at T = 2,
whose terms count as they do at alpha = 0.1/9.1 = 0.011, where alpha weighs the class loss.

Shapes: S stacked students (absent for one), B batch, C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import check_positive
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.methods.maps.losses import kl_divergence
from vitkd.models import Model, Output, Taps
from vitkd.models.output import at_least_float32


class LogitObjective(Objective):
    """Compares the class probabilities by `softened_divergence`."""

    teacher_taps = Taps()

    def __init__(self, temperature: float, standardize: bool = False) -> None:
        super().__init__()
        self.temperature, self.standardize = temperature, standardize

    @property
    def stack_key(self) -> Any:
        return type(self), self.temperature, self.standardize

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        ours, theirs = student.answer, teacher.answer
        if self.standardize:
            ours, theirs = z_scores(ours), z_scores(theirs)
        return {"logit_loss": softened_divergence(ours, theirs, self.temperature).unsqueeze(-1)}


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of the classes' probabilities, both softened by a temperature T, in nats.

    T² keeps the gradient's size as it is at T = 1. From logits [*S, B, C] and [B, C] to [*S, B].
    """
    log_q = (at_least_float32(student) / temperature).log_softmax(-1)
    log_p = (at_least_float32(teacher) / temperature).log_softmax(-1)
    return temperature**2 * kl_divergence(log_p, log_q)


def z_scores(logits: Tensor) -> Tensor:
    """Logits [*S, B, C] with a mean of 0 and a variance of 1 over the classes of each image."""
    logits = at_least_float32(logits)
    std, mean = torch.std_mean(logits, -1, keepdim=True)
    # As in the released code; it keeps equal logits from becoming NaN.
    return (logits - mean) / (std + 1e-7)


@dataclass
class LogitDistillation(Method):
    """The student learns labels and its teacher's class probabilities."""

    temperature: float = 4.0
    standardize: bool = False
    """compare the logits' z-scores"""

    ignores = "granularity", "loss"

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> LogitObjective:
        return LogitObjective(self.temperature, self.standardize)
