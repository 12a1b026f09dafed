"""`method=none`: the student alone, on labels; the baseline."""

from dataclasses import dataclass

from vitkd.methods.base import DataFacts, MapSettings, Method
from vitkd.models import Model


@dataclass
class NoDistillation(Method):
    """The student learns labels and nothing else."""

    needs_teacher = False
    ignores = "alpha", "weighting", "granularity", "loss", "teacher"

    def objective(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> None:
        """Nothing is learned from a teacher."""
