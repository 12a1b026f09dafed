"""The ways to train a student: what each needs, and the LightningModule it trains with."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vitkd.distill.alignment import align
from vitkd.distill.controls import CONTROLS
from vitkd.distill.granularity import Granularity
from vitkd.distill.losses import AttentionLoss
from vitkd.distill.matching import match_heads
from vitkd.distill.modules import ClassifyModule, DistillModule
from vitkd.distill.optimization import AdamW, Schedule
from vitkd.distill.pairing import BlockPair
from vitkd.distill.transfer import AttentionTransfer, Transfer
from vitkd.errors import ConfigError
from vitkd.models import Model, ModelConfig, ViT, ViTConfig

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


@dataclass
class AttentionDistillation(Distillation):
    """The student learns labels and where the teacher looks."""

    resize: str | None = None
    """`bilinear` interpolates the teacher's maps to the student's token grid; null demands equal grids."""
    control: str | None = None
    """What is taught instead of the teacher's maps, to see whether these are what helps; see `controls`."""

    def __post_init__(self) -> None:
        if self.control is not None and self.control not in CONTROLS:
            raise ConfigError(f"control={self.control}: choose {', '.join(CONTROLS)} or null")
        if self.resize not in (None, "bilinear"):
            raise ConfigError(f"resize={self.resize}: choose bilinear or null")

    def check(self, student: ModelConfig, teacher: ModelConfig, plan: Plan) -> None:
        others = "method=logit or method=token" if isinstance(student, ViTConfig) else "method=logit"
        ours, theirs = with_maps(student, teacher, f"{others}, without maps")
        plan.granularity.pairs(ours, theirs)
        if self.resize is None:
            check_equal_grids(ours, theirs, "method.resize=bilinear")
        elif theirs.allowed() is not None:
            check_equal_grids(ours, theirs, "no teacher.attention=lsa, whose mask cannot be resized")

    def transfer(
        self, student: Model, teacher: Model, plan: Plan, calibrate: Calibration
    ) -> AttentionTransfer:
        return attention_transfer(student, teacher, plan, calibrate, self.control)


def with_maps(student: ModelConfig, teacher: ModelConfig, otherwise: str) -> tuple[ViTConfig, ViTConfig]:
    """Both, known to have attention maps; ConfigError, advising `otherwise`, if one has none."""
    for whose, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, ViTConfig):
            raise ConfigError(f"{whose}={model}: has no attention maps; choose a ViT, or {otherwise}")
    assert isinstance(student, ViTConfig)
    assert isinstance(teacher, ViTConfig)
    return student, teacher


def check_equal_grids(student: ViTConfig, teacher: ViTConfig, otherwise: str) -> None:
    """ConfigError, advising `otherwise`, unless both cut the image into as many patches."""
    ours, theirs = (f"{model.grid}×{model.grid}" for model in (student, teacher))
    if ours != theirs:
        raise ConfigError(
            f"the student's {ours} token grid is not the teacher's {theirs}: use equal patch sizes, or "
            f"{otherwise}"
        )


def attention_transfer(
    student: Model, teacher: Model, plan: Plan, calibrate: Calibration, control: str | None = None
) -> AttentionTransfer:
    """What `plan`'s granularity and loss teach."""
    assert isinstance(student, ViT)
    assert isinstance(teacher, ViT)
    pairs = plan.granularity.pairs(student.config, teacher.config)
    alignment = align(student.config, teacher.config)
    if plan.granularity.needs_calibration:
        both = record_both(student, teacher, pairs, calibrate())
        pairs = match_heads(pairs, *both, plan.loss, alignment)
    tokens = max(student.config.tokens, teacher.config.tokens)
    return AttentionTransfer(pairs, plan.loss, alignment, tokens, control)


@torch.no_grad()
def record_both(
    student: ViT, teacher: ViT, pairs: list[BlockPair], images: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The scores of the paired blocks of both models in eval mode; no random number is drawn."""
    was_training = student.training
    student_scores = student.eval().scores(images, [pair.student_block for pair in pairs])
    student.train(was_training)
    return student_scores, teacher.eval().scores(images, [pair.teacher_block for pair in pairs])
