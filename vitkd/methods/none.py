"""`method=none`: the student alone, on labels; the baseline."""

from dataclasses import dataclass

from vitkd.methods.base import DataFacts, MapSettings, Method
from vitkd.models import Model, ModelConfig


@dataclass
class NoDistillation(Method):
    """The student learns labels and nothing else."""

    needs_teacher = False

    @property
    def ignores(self) -> tuple[str, ...]:
        return "alpha", "weighting", "granularity", "loss", "teacher"

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        """Every student can learn labels."""

    def objective(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> None:
        """Nothing is learned from a teacher."""
