"""`method=subspace`: a slice of the teacher's representation (Malik et al. 2020, arXiv 2004.03281).

The teacher's representation h [B, D] before its last layer is cut into n equal, disjoint slices, and each of
n students learns one of them, by the paper's mean squared error:

    L_k = mean over the slice's entries of (h_k − s_k)²

s_k is the student's own representation, of width D/n. Its head begins as the teacher's last layer for that
slice: W_k, the columns of W, and b/n. As W h + b = Σ_k (W_k h_k + b/n), the sum of the students' logits is
the teacher's last layer on their representations side by side, which is how `student=merged` joins them.

alpha = 0 is the paper, whose students see no labels. Its other variant, a discriminator that tells students
from teachers, is left out.

Shapes: S stacked students (absent for one), B batch, D the teacher's width, n slices, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import ConfigError, check_at_least
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.models import Model, ModelConfig, Output, Taps
from vitkd.models.output import at_least_float32

REPRESENTATION = "pre_logits"


class SubspaceObjective(Objective):
    """Compares the student's representation with a slice of the teacher's.

    Args:
        index: which slice, from 0.
        size: its width.
    """

    student_taps = Taps(features=(REPRESENTATION,))
    teacher_taps = Taps(features=(REPRESENTATION,), logits=False)

    def __init__(self, index: int, size: int) -> None:
        super().__init__()
        self.start, self.size = index * size, size

    @property
    def stack_key(self) -> tuple[type, int, int]:
        return type(self), self.start, self.size

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        whole = at_least_float32(teacher.features[REPRESENTATION])
        difference = at_least_float32(student.features[REPRESENTATION]) - self.slice_of(whole)
        return {"subspace_loss": difference.square().mean(-1, keepdim=True)}

    def slice_of(self, whole: Tensor) -> Tensor:
        """The slice [..., D/n] of something [..., D] that has an entry for each of the representation."""
        return whole.narrow(-1, self.start, self.size)


@dataclass
class SubspaceDistillation(Method):
    """The student learns labels and a slice of its teacher's representation, as wide as its own is."""

    slice: int = 0

    ignores = "granularity", "loss"

    def __post_init__(self) -> None:
        check_at_least(0, self, "slice")

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        size, width = representation_size("student", student), representation_size("teacher", teacher)
        if width % size:
            sizes = ", ".join(str(size) for size in range(1, width + 1) if width % size == 0)
            raise ConfigError(
                f"student.representation_size={size}: does not divide the teacher's representation of "
                f"{width} into equal slices; choose one of {sizes}"
            )
        if self.slice >= width // size:
            raise ConfigError(
                f"method.slice={self.slice}: the teacher's representation of {width} has {width // size} "
                f"slices of student.representation_size={size}, counted from 0"
            )

    @torch.no_grad()
    def set_first_weights(self, student: Model, teacher: Model) -> None:
        head, last = student.classifier, teacher.classifier
        assert head is not None, "`check` found one"
        assert last is not None, "`check` found one"
        objective = SubspaceObjective(self.slice, head.in_features)
        head.weight.copy_(objective.slice_of(last.weight))
        head.bias.copy_(last.bias * (head.in_features / last.in_features))

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> SubspaceObjective:
        assert student.classifier is not None, "`check` found one"
        return SubspaceObjective(self.slice, student.classifier.in_features)


def representation_size(owner: str, config: ModelConfig) -> int:
    """The width of a model's representation; ConfigError unless a linear last layer makes logits of it."""
    with torch.device("meta"):
        last_layer = config.architecture().classifier
    if last_layer is None:
        raise ConfigError(
            f"{owner}={config}: method=subspace needs a single linear layer from representation to logits; "
            "choose a model without distillation token, or method=logit"
        )
    return last_layer.in_features
