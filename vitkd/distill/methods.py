"""The ways to train a student: what each needs, and the LightningModule it trains with."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vitkd.distill.controls import CONTROLS
from vitkd.distill.granularity import Granularity
from vitkd.distill.losses import AttentionLoss
from vitkd.distill.modules import ClassifyModule, DistillModule
from vitkd.distill.optimization import AdamW, Schedule
from vitkd.distill.pairing import BlockPair, match_heads
from vitkd.distill.transfer import AttentionTransfer, token_interpolation
from vitkd.errors import ConfigError
from vitkd.models import ViT, ViTConfig

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
    ignores: ClassVar[tuple[str, ...]] = ()
    """Settings without effect under this method: naming one on the command line earns a warning."""

    @abstractmethod
    def check(self, student: ViTConfig, teacher: ViTConfig, plan: Plan) -> None:
        """Raise ConfigError if the student cannot learn from the teacher this way."""

    @abstractmethod
    def module(self, student: ViT, teacher: ViT | None, plan: Plan, calibrate: Calibration) -> ClassifyModule:
        """The module to fit; `calibrate` gives a batch of training images [B, C, H, W]."""


@dataclass
class NoDistillation(Method):
    """The student alone, on labels: the baseline."""

    needs_teacher = False
    ignores = ("alpha", "granularity", "loss", "teacher")

    def check(self, student: ViTConfig, teacher: ViTConfig, plan: Plan) -> None:
        """Every student can learn labels."""

    def module(self, student: ViT, teacher: ViT | None, plan: Plan, calibrate: Calibration) -> ClassifyModule:
        return ClassifyModule(student, plan.optimizer, plan.schedule, plan.label_smoothing)


@dataclass
class AttentionDistillation(Method):
    """The student learns labels and where the teacher looks."""

    needs_teacher = True
    resize: str | None = None
    """`bilinear` interpolates the teacher's maps to the student's token grid; null demands equal grids."""
    control: str | None = None
    """What is taught instead of the teacher's maps, to see whether these are what helps; see `controls`."""

    def __post_init__(self) -> None:
        if self.control is not None and self.control not in CONTROLS:
            raise ConfigError(f"control={self.control}: choose {', '.join(CONTROLS)} or null")
        if self.resize not in (None, "bilinear"):
            raise ConfigError(f"resize={self.resize}: choose bilinear or null")

    def check(self, student: ViTConfig, teacher: ViTConfig, plan: Plan) -> None:
        plan.granularity.pairs(student, teacher)
        if student.grid != teacher.grid and self.resize is None:
            raise ConfigError(
                f"the student's {student.grid}×{student.grid} token grid is not the teacher's "
                f"{teacher.grid}×{teacher.grid}: use equal patch sizes, or method.resize=bilinear"
            )

    def module(self, student: ViT, teacher: ViT | None, plan: Plan, calibrate: Calibration) -> ClassifyModule:
        assert teacher is not None
        pairs = plan.granularity.pairs(student.config, teacher.config)
        ours, theirs = student.config.grid, teacher.config.grid
        resize = None if ours == theirs else token_interpolation(theirs, ours)
        if plan.granularity.needs_calibration:
            pairs = match_heads(pairs, *record_both(student, teacher, pairs, calibrate()), plan.loss, resize)
        tokens = max(student.config.tokens, teacher.config.tokens)
        transfer = AttentionTransfer(pairs, plan.loss, resize, tokens=tokens, control=self.control)
        return DistillModule(
            student, teacher, transfer, plan.alpha, plan.optimizer, plan.schedule, plan.label_smoothing
        )


@torch.no_grad()
def record_both(
    student: ViT, teacher: ViT, pairs: list[BlockPair], images: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The scores of the paired blocks of both models in eval mode; no random number is drawn."""
    was_training = student.training
    student_scores = student.eval().scores(images, [pair.student_block for pair in pairs])
    student.train(was_training)
    return student_scores, teacher.eval().scores(images, [pair.teacher_block for pair in pairs])
