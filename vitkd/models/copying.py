"""A ViT that attends where another model does: of the chosen blocks it computes values only.

So it needs that model wherever it is used, and both are one model, with one file.

Shapes: B batch, H heads, Q queries, K keys; a plain ViT has Q = K tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vitkd.models.base import Model, ModelConfig, Trace, configuration
from vitkd.models.output import LOGITS, OUTER, AttentionLayout, Output, Taps, select
from vitkd.models.vit import ViT


class CopiedBlock(NamedTuple):
    """A student block that attends as a teacher block does."""

    student_block: int
    teacher_block: int
    teacher_heads: Sequence[Sequence[int]]
    """for each student head those whose mean weights it takes"""


@dataclass(repr=False)
class CopyingConfig(ModelConfig):
    """Everything that determines a student together with its teacher; plain values, as files hold them."""

    why_alone = "it runs its teacher, which a stack does not hold"

    student: dict[str, Any]
    """a ViT, as the header of its file describes it"""
    teacher: dict[str, Any]
    """any model with attention maps, in the same way"""
    copies: list[list[Any]]
    """the fields of each `CopiedBlock`"""

    def __str__(self) -> str:
        blocks = ", ".join(str(block.student_block) for block in self.blocks)
        return f"{self.of_student}, attending as its teacher in blocks {blocks}"

    @property
    def blocks(self) -> list[CopiedBlock]:
        """The student blocks that attend as the teacher does."""
        return [CopiedBlock(*fields) for fields in self.copies]

    @property
    def of_student(self) -> ModelConfig:
        """The student's own configuration."""
        return configuration(self.student)

    @property
    def of_teacher(self) -> ModelConfig:
        """The teacher's."""
        return configuration(self.teacher)

    @property
    def depth(self) -> int:
        """The blocks of both."""
        return len(self.of_student.attention_layouts()) + len(self.of_teacher.attention_layouts())

    @property
    def drops(self) -> bool:
        return self.of_student.drops

    @property
    def has_distillation_token(self) -> bool:
        return self.of_student.has_distillation_token

    def attention_layouts(self, part: str = OUTER) -> tuple[AttentionLayout, ...]:
        return self.of_student.attention_layouts(part)

    def architecture(self) -> "CopyingModel":
        return CopyingModel(self, self.of_student.architecture(), self.of_teacher.architecture())


class CopyingModel(Model):
    """A student whose teacher, frozen and in eval mode, says where its chosen blocks look."""

    config: CopyingConfig

    def __init__(self, config: CopyingConfig, student: Model, teacher: Model) -> None:
        super().__init__()
        assert isinstance(student, ViT), "no other attends by given scores"
        self.config, self.student, self.teacher = config, student, teacher.requires_grad_(False)
        self.teacher_taps = Taps(
            scores=tuple(sorted({block.teacher_block for block in config.blocks})), logits=False
        )
        self.train(student.training)

    @property
    def blocks(self) -> Any:
        """The student's, for explanations that read their norms."""
        return self.student.blocks

    def layers_in_order(self) -> list[nn.Module]:
        return self.student.layers_in_order()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [B, C, H, W], and return what `taps` asks for of the student.

        A copied block has scores, whose softmax are the teacher's weights, but neither queries nor keys.
        """
        output = self.student(images, taps._replace(logits=True), self.copied(images))
        return output if taps.logits else output._replace(logits=None, heads={})

    def trace(self, images: Tensor) -> Trace:
        return self.student.trace(images, self.copied(images))

    def copied(self, images: Tensor) -> dict[int, Tensor]:
        """Student block → scores [B, H, Q, K] whose softmax are the teacher's attention weights."""
        scores = self.teacher(images, self.teacher_taps).scores
        layouts = self.teacher.attention
        return {
            block.student_block: mean_scores(
                scores[block.teacher_block], block.teacher_heads, layouts[block.teacher_block].mask
            )
            for block in self.config.blocks
        }


def mean_scores(scores: Tensor, heads: Sequence[Sequence[int]], mask: Tensor | None) -> Tensor:
    """Scores [B, len(heads), Q, K] whose softmax is the mean over each group of heads of that of `scores`.

    `mask` [Q, K] is False where the teacher does not look.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask.to(scores.device), -inf)
    members = [select(scores, place, dim=-3) for place in zip(*heads, strict=True)]
    if len(members) == 1:
        return members[0]
    return torch.stack([each.log_softmax(-1) for each in members]).logsumexp(0) - log(len(members))
