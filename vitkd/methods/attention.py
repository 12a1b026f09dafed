"""`method=attention`: the student learns where its teacher looks.

Shapes: B batch, H heads, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.base import Calibration, Distillation, Plan
from vitkd.methods.maps.alignment import align
from vitkd.methods.maps.controls import CONTROLS
from vitkd.methods.maps.matching import match_heads
from vitkd.methods.maps.objective import AttentionTransfer
from vitkd.methods.maps.pairing import BlockPair
from vitkd.models import Model, ModelConfig, ViT, ViTConfig


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
