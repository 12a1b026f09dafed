"""The ways to train a student: what each needs, and the LightningModule it trains with."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from vitkd.methods.maps.granularity import Granularity
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.maps.objective import Transfer
from vitkd.models import Model, ModelConfig
from vitkd.optim import AdamW, Schedule
from vitkd.train.module import ClassifyModule, DistillModule

Calibration = Callable[[], Tensor]


class Plan(Protocol):
    """The settings a method may use; the run's configuration has them all."""

    granularity: Granularity
    loss: AttentionLoss
    alpha: float
    optimizer: AdamW
    schedule: Schedule
    label_smoothing: float


@dataclass
class Method(ABC):
    """Builds the module that trains the student."""

    needs_teacher: ClassVar[bool]

    @property
    def ignores(self) -> tuple[str, ...]:
        """Settings without effect under this method: naming one on the command line earns a warning."""
        return ()

    @abstractmethod
    def check(self, student: ModelConfig, teacher: ModelConfig, plan: Plan) -> None:
        """Raise ConfigError if the student cannot learn from the teacher this way."""

    @abstractmethod
    def module(
        self, student: Model, teacher: Model | None, plan: Plan, calibrate: Calibration
    ) -> ClassifyModule:
        """The module to fit; `calibrate` gives a batch of training images [B, C, H, W]."""


@dataclass
class Distillation(Method):
    """The student learns labels and, by a `Transfer`, from a teacher."""

    needs_teacher = True

    @abstractmethod
    def transfer(self, student: Model, teacher: Model, plan: Plan, calibrate: Calibration) -> Transfer:
        """What the student learns from the teacher; `calibrate` as for `module`."""

    def module(
        self, student: Model, teacher: Model | None, plan: Plan, calibrate: Calibration
    ) -> DistillModule:
        assert teacher is not None
        transfer = self.transfer(student, teacher, plan, calibrate)
        return DistillModule(
            student, teacher, transfer, plan.alpha, plan.optimizer, plan.schedule, plan.label_smoothing
        )
