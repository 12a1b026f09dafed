"""`method=dearkd`: early knowledge distillation (DearKD: Chen et al. 2022, CVPR, arXiv 2204.12997).

A re-implementation; not verified against the authors, who published no code. In a first stage the student
learns, besides labels, what a convolutional teacher answers and what its early stages see; in the second it
learns from the labels alone, so as not to be held to a convolution's view:

    stage one  alpha·L_class + (1 − alpha)·(L_logit + β·Σ over pairs l of MSE(F_t, A_l(F_s)))
    stage two  L_class

The stages are those of `weighting=step`, which the method's file chooses: in the second the class weight is
1, so the teacher is not asked. From the paper are the two stages, the teacher's early features *and* its
logits, and an aligner A_l, trained beside the student, between tokens and feature maps. Chosen here:

- F_s, the patch tokens of student block l, its whole output, not its attention's; blocks 0 and 1 learn from
  stages 1 and 2;
- A_l, the 1×1 convolution of `method=locality`, and the mean squared difference on the larger of both grids;
- L_logit, on the student's one answer: cross-entropy with the teacher's class, as in DeiT's equation 3, or
  T²·KL (equation 2);
- alpha, β, and the share of the epochs that the first stage takes, half (`weighting.at`);
- one optimiser and one schedule for both stages; a ResNet in eval mode as the teacher, not a RegNetY.

Left out are the paper's multi-head convolutional attention, which makes another student of the one that is
compared under all methods, and its synthetic images for training without data.

Shapes: B batch, P pairs of block and stage.
"""

from dataclasses import dataclass, field

from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import check_choice, check_positive
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.methods.locality import LocalityDistillation, LocalityObjective
from vitkd.methods.logit import softened_divergence
from vitkd.methods.weighting import cross_entropy
from vitkd.models import Model, ModelConfig, Output


class DearkdObjective(Objective):
    """Compares logits, and early blocks with early stages, in the epochs of the first stage.

    Args:
        features: compares blocks with stages, and learns to align them.
        targets: hard or soft.
        temperature: of soft targets.
        feature_weight: β.
    """

    def __init__(
        self, features: LocalityObjective, targets: str, temperature: float, feature_weight: float
    ) -> None:
        super().__init__()
        self.features, self.targets = features, targets
        self.temperature, self.feature_weight = temperature, feature_weight
        self.student_taps = features.student_taps
        self.teacher_taps = features.teacher_taps._replace(logits=True)
        self.curves = ("logit_loss", *features.curves)

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        if self.targets == "hard":
            losses = cross_entropy(student.answer, teacher.predicted)
        else:
            losses = softened_divergence(student.answer, teacher.answer, self.temperature)
        return {"logit_loss": losses.unsqueeze(-1), **self.features(batch, student, teacher)}

    def transfer(self, terms: Terms) -> Tensor:
        features = {name: values for name, values in terms.items() if name != "logit_loss"}
        return terms["logit_loss"].squeeze(-1) + self.feature_weight * self.features.transfer(features)


@dataclass
class DearkdDistillation(Method):
    """At first the student learns a convolutional network's early features and its answers, too."""

    blocks: list[int] = field(default_factory=lambda: [0, 1])
    """of the student, one for each stage"""
    stages: list[int] = field(default_factory=lambda: [1, 2])
    """of the teacher, counted from 1"""
    targets: str = "hard"
    """hard, the teacher's class | soft, its probabilities"""
    temperature: float = 3.0
    """of soft targets"""
    feature_weight: float = 0.1
    """β, of the comparison of features beside that of logits"""

    trains_parameters = True

    def __post_init__(self) -> None:
        check_choice(self, "targets", ("hard", "soft"))
        check_positive(self, "temperature", "feature_weight")

    @property
    def ignores(self) -> tuple[str, ...]:
        of_targets = ("method.temperature",) if self.targets == "hard" else ()
        return ("granularity", "loss", *of_targets)

    @property
    def of_features(self) -> LocalityDistillation:
        """The comparison of features alone."""
        return LocalityDistillation(self.blocks, self.stages)

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        self.of_features.check(student, teacher, settings)

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> DearkdObjective:
        features = self.of_features.objective(student, teacher, settings, data)
        return DearkdObjective(features, self.targets, self.temperature, self.feature_weight)
