"""`method=logit`: distillation of class probabilities (Hinton, Vinyals and Dean 2015); no map is compared.

Shapes: S stacked students (absent for one), B batch, C classes.
"""

from dataclasses import dataclass
from typing import Any

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

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @property
    def stack_key(self) -> Any:
        return type(self), self.temperature

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        divergence = softened_divergence(student.answer, teacher.answer, self.temperature)
        return {"logit_loss": divergence.unsqueeze(-1)}


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of the classes' probabilities, both softened by a temperature T, in nats.

    T² keeps the gradient's size as it is at T = 1. From logits [*S, B, C] and [B, C] to [*S, B].
    """
    log_q = (at_least_float32(student) / temperature).log_softmax(-1)
    log_p = (at_least_float32(teacher) / temperature).log_softmax(-1)
    return temperature**2 * kl_divergence(log_p, log_q)


@dataclass
class LogitDistillation(Method):
    """The student learns labels and its teacher's class probabilities."""

    temperature: float = 4.0

    ignores = "granularity", "loss"

    def __post_init__(self) -> None:
        check_positive(self, "temperature")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> LogitObjective:
        return LogitObjective(self.temperature)
