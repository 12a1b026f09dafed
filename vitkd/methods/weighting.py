"""`weighting=`: how much each term and each image counts; each class is its own configuration schema.

    L = w·L_class + (1 − w)·mean over images of u·L_transfer

The class weight w is `alpha` unless a weighting changes it; the image weight u is 1. All weights are
constants of the backward pass.

Shapes: S stacked students (absent for one), B batch, C classes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.errors import check, check_positive
from vitkd.models.output import at_least_float32


@dataclass
class Weighting:
    """Says how much each term and each image counts; its fields are the keys of its file's settings."""

    needs_teacher_logits: ClassVar[bool] = False
    """whether `image_weight` looks at the teacher's logits"""
    needs_gradients: ClassVar[bool] = False
    """whether `balanced` sets the class weight at every logged step, in place of `class_weight`"""

    @property
    def stack_key(self) -> Any:
        """Equal for weightings that can weigh a group of stacked students in one go."""
        return type(self), tuple(asdict(self).items())

    def distils(self, alpha: float) -> bool:
        """Whether the transfer loss counts in any epoch; if not, training is the student's alone."""
        return alpha < 1

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        """w in `epoch`, counted from 0, of `epochs`; at 1 the transfer loss is not computed then."""
        return alpha

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor | None:
        """u [*S, B], or None where all images count alike.

        Args:
            label: [*S, B].
            student: logits that learn the labels [*S, B, C], without gradient.
            teacher: logits [*S, B, C], if `needs_teacher_logits`.
        """
        return None

    def balanced(self, class_norm: Tensor, transfer_norm: Tensor) -> Tensor:
        """w [*S] by the norms [*S] of both terms' gradients, if `needs_gradients`; NaN leaves it as it is."""
        raise NotImplementedError


@dataclass
class Constant(Weighting):
    """`weighting=constant`: alpha weighs the class loss in every epoch, and all images count alike."""


@dataclass
class Linear(Weighting):
    """`weighting=linear`: the class weight moves from alpha to `end` in equal steps."""

    end: float = 1.0
    """the class weight of the last epoch; 1 ends with the labels alone"""

    def __post_init__(self) -> None:
        check(self, "end", 0 <= self.end <= 1, "must lie in [0, 1]; it is the last epoch's class weight")

    def distils(self, alpha: float) -> bool:
        return min(alpha, self.end) < 1

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        progress = self.progress(epoch / (epochs - 1) if epochs > 1 else 0.0)
        # Exact at both ends: at a class weight of 1 the transfer loss is not computed.
        return {0.0: alpha, 1.0: self.end}.get(progress, alpha + (self.end - alpha) * progress)

    def progress(self, share: float) -> float:
        """How far the weight has moved, in [0, 1], when `share` of the epochs has passed."""
        return share


class Cosine(Linear):
    """`weighting=cosine`: the class weight moves by half a cosine, slowly at both ends."""

    def progress(self, share: float) -> float:
        return {0.0: 0.0, 1.0: 1.0}.get(share, (1 - math.cos(math.pi * share)) / 2)


@dataclass
class Step(Linear):
    """`weighting=step`: the class weight changes from alpha to `end` at once."""

    at: float = 0.5
    """the share of all epochs after which it changes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "at", 0 < self.at < 1, "must lie between 0 and 1; it is a share of all epochs")

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        # The first epoch is always of the first stage.
        return alpha if epoch < max(1, math.ceil(self.at * epochs)) else self.end


@dataclass
class GradientBalance(Weighting):
    """`weighting=gradient_balance`: the class weight w brings the terms' gradients to a set ratio.

    (1 − w)·‖∇L_transfer‖ = ratio·w·‖∇L_class‖, solved at every logged step, where both norms are measured
    anyway, and kept until the next. alpha is the class weight until the first.
    """

    ratio: float = 1.0
    """of the transfer loss's weighted gradient norm to the class loss's"""

    needs_gradients = True

    def __post_init__(self) -> None:
        check_positive(self, "ratio")

    def balanced(self, class_norm: Tensor, transfer_norm: Tensor) -> Tensor:
        weight = transfer_norm / (transfer_norm + self.ratio * class_norm)
        # Where a term has no gradient there is no ratio, and a weight of 0 or 1 would never be left again.
        have_ratio = (weight > 0) & (weight < 1)
        return torch.where(have_ratio, weight, math.nan)


@dataclass
class StudentCorrect(Weighting):
    """`weighting=student_correct`: less weight on images that the student has wrong.

    So the student may explore other patterns there (the report's "adaptive distillation weighting").
    """

    factor: float = 0.5
    """the weight of an image that the student has wrong; 1 for all others"""

    def __post_init__(self) -> None:
        check(self, "factor", 0 <= self.factor < math.inf, "must be a finite number, 0 or more")

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
        return (-cross_entropy(teacher, label)).exp().expand(student.shape[:-1])


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
        of_teacher = cross_entropy(teacher, label)
        # A teacher that is certain and right has a loss of 0; then every image counts fully.
        ratio = cross_entropy(student, label) / of_teacher.clamp(min=torch.finfo(of_teacher.dtype).tiny)
        return -torch.expm1(-ratio)


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Each image's cross-entropy [*S, B] in nats, from logits [*S, B, C].

    `truth` are labels [B] or [*S, B], or each class's shares [B, C] or [*S, B, C].
    """
    if truth.is_floating_point():
        log_p = at_least_float32(logits).log_softmax(-1)
        return -(truth.to(log_p) * log_p).sum(-1)
    label = truth.expand(logits.shape[:-1])
    # Not `gather`: in deterministic mode its backward pass waits for the device.
    flat = F.cross_entropy(at_least_float32(logits).flatten(0, -2), label.flatten(), reduction="none")
    return flat.view(label.shape)
