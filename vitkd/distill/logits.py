"""Distillation of class probabilities (Hinton, Vinyals and Dean 2015): no attention map is compared.

Shapes: S stacked students (absent for one), B batch, K classes.
"""

from dataclasses import dataclass

from torch import Tensor

from vitkd.distill.methods import Calibration, Method, Plan
from vitkd.distill.modules import ClassifyModule, DistillModule
from vitkd.distill.teacher_cache import Answer
from vitkd.distill.transfer import Transfer
from vitkd.errors import ConfigError
from vitkd.models import ViT, ViTConfig, ViTOutput
from vitkd.models.layers import at_least_float32


class LogitTransfer(Transfer):
    """T²·KL(teacher ‖ student) of the class probabilities, both softened by a temperature T, in nats.

    T² keeps the gradient's size as it is at T = 1.
    """

    needs_logits = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def compare(self, student: ViTOutput, teacher: Answer) -> Tensor:
        """The mean over images [*S, 1] of logits [*S, B, K] and [B, K]."""
        assert teacher.logits is not None
        log_q = (at_least_float32(student.logits) / self.temperature).log_softmax(-1)
        log_p = (at_least_float32(teacher.logits) / self.temperature).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1, keepdim=True)
        return self.temperature**2 * divergence

    def total(self, values: Tensor) -> Tensor:
        return values.squeeze(-1)


@dataclass
class LogitDistillation(Method):
    """The student learns labels and its teacher's class probabilities."""

    needs_teacher = True
    ignores = ("granularity", "loss")
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be a finite number above 0")

    def check(self, student: ViTConfig, teacher: ViTConfig, plan: Plan) -> None:
        """Every student can learn what its teacher says: the classes are the data set's."""

    def module(self, student: ViT, teacher: ViT | None, plan: Plan, calibrate: Calibration) -> ClassifyModule:
        assert teacher is not None
        transfer = LogitTransfer(self.temperature)
        return DistillModule(
            student, teacher, transfer, plan.alpha, plan.optimizer, plan.schedule, plan.label_smoothing
        )
