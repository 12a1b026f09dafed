"""`method=none`: the student alone."""

from dataclasses import dataclass

from vitkd.methods.base import Calibration, Method, Plan
from vitkd.models import Model, ModelConfig
from vitkd.train.module import ClassifyModule


@dataclass
class NoDistillation(Method):
    """The student alone, on labels: the baseline."""

    needs_teacher = False

    @property
    def ignores(self) -> tuple[str, ...]:
        return "alpha", "granularity", "loss", "teacher"

    def check(self, student: ModelConfig, teacher: ModelConfig, plan: Plan) -> None:
        """Every student can learn labels."""

    def module(
        self, student: Model, teacher: Model | None, plan: Plan, calibrate: Calibration
    ) -> ClassifyModule:
        return ClassifyModule(student, plan.optimizer, plan.schedule, plan.label_smoothing)
