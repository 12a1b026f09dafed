"""Weightings by the image: how much an image's transfer loss counts.

Shapes: S stacked students (absent for one), B batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.weighting.base import Weighting, cross_entropy


@dataclass
class StudentCorrect(Weighting):
    """`weighting=student_correct`: less weight on images that the student has wrong.

    So the student may explore other patterns there (the report's "adaptive distillation weighting").
    """

    factor: float = 0.5
    """the weight of an image that the student has wrong; 1 for all others"""

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise ConfigError(f"factor={self.factor}: must be a finite number, 0 or more")

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor:
        weight = torch.full_like(student[..., 0], self.factor)
        return weight.masked_fill(student.argmax(-1) == label, 1)


@dataclass
class TeacherCorrect(Weighting):
    """`weighting=teacher_correct`: no weight where the teacher is wrong (the report's Figure 3)."""

    needs_teacher_logits = True

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor:
        assert teacher is not None
        return (teacher.argmax(-1) == label).to(student.dtype).expand(student.shape[:-1])


@dataclass
class Confidence(Weighting):
    """`weighting=confidence`: an image counts by the teacher's probability of its true class."""

    needs_teacher_logits = True

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor:
        assert teacher is not None
        return (-cross_entropy(teacher, label.expand(teacher.shape[:-1]))).exp().expand(student.shape[:-1])


@dataclass
class WSLD(Weighting):
    """`weighting=wsld`: u = 1 − exp(−CE_student / CE_teacher) (Zhou et al. 2021, arXiv 2102.00650).

    "Weighted soft labels": an image counts the less the better the student already knows it compared with the
    teacher. So an image that the student has wrong counts *more*; the report's proposal, `student_correct`,
    points the other way. Both cross-entropies are with the labels, at temperature 1.
    """

    needs_teacher_logits = True

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor:
        assert teacher is not None
        of_teacher = cross_entropy(teacher, label.expand(teacher.shape[:-1]))
        # A teacher that is certain and right has a loss of 0; then every image counts fully.
        ratio = cross_entropy(student, label) / of_teacher.clamp(min=torch.finfo(of_teacher.dtype).tiny)
        return -torch.expm1(-ratio)
