"""Distillation of class probabilities (Hinton, Vinyals and Dean 2015): no attention map is compared.

Shapes: S stacked students (absent for one), B batch, K classes.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.base import Calibration, Distillation, Plan
from vitkd.methods.maps.losses import kl_divergence
from vitkd.methods.maps.objective import Transfer
from vitkd.models import Model, ModelConfig, ModelOutput
from vitkd.models.base import Answer
from vitkd.models.layers import at_least_float32


class LogitTransfer(Transfer):
    """Compares the class probabilities by `softened_divergence`."""

    needs_logits = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @property
    def kind(self) -> Any:
        return type(self), self.temperature

    def compare(self, student: ModelOutput, teacher: Answer) -> Tensor:
        """The mean over images [*S, 1] of logits [*S, B, K] and [B, K]."""
        assert teacher.logits is not None
        return softened_divergence(student.logits, teacher.logits, self.temperature)

    def total(self, values: Tensor) -> Tensor:
        return values.squeeze(-1)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of the classes' probabilities, both softened by a temperature T, in nats.

    T² keeps the gradient's size as it is at T = 1. The mean over images [*S, 1], of logits [*S, B, K] and
    [B, K].
    """
    log_q = (at_least_float32(student) / temperature).log_softmax(-1)
    log_p = (at_least_float32(teacher) / temperature).log_softmax(-1)
    return temperature**2 * kl_divergence(log_p, log_q).mean(-1, keepdim=True)


@dataclass
class LogitDistillation(Distillation):
    """The student learns labels and its teacher's class probabilities."""

    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be a finite number above 0")

    @property
    def ignores(self) -> tuple[str, ...]:
        return "granularity", "loss"

    def check(self, student: ModelConfig, teacher: ModelConfig, plan: Plan) -> None:
        """Every student can learn what its teacher says: the classes are the data set's."""

    def transfer(self, student: Model, teacher: Model, plan: Plan, calibrate: Calibration) -> LogitTransfer:
        return LogitTransfer(self.temperature)
