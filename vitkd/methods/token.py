"""`method=token`: distillation through a token (DeiT: Touvron et al. 2021, arXiv 2012.12877, section 4).

The student's class token learns the labels, its distillation token the teacher's classes:

    hard  alpha·CE(class token, y) + (1 − alpha)·CE(distillation token, the teacher's class)     (equation 3)
    soft  alpha·CE(class token, y) + (1 − alpha)·T²·KL(teacher ‖ distillation token)             (equation 2)

with both sides of KL softened by the temperature T. The paper's weights weigh the other term; its released
code divides KL by batch · classes, so its soft term is 1/classes of the paper's and of ours. Any teacher will
do. At alpha = 1 training is the student's alone: labels for the mean of both heads.

Shapes: S stacked students (absent for one), B batch, C classes, P student maps.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import ConfigError, check, check_choice, check_positive
from vitkd.methods.attention import attention_objective, check_grids, check_maps, check_windows
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.methods.logit import softened_divergence
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.weighting import cross_entropy
from vitkd.models import Model, ModelConfig, Output, Taps


class TokenObjective(Objective):
    """Compares the distillation token's logits with the teacher's, and perhaps attention maps besides.

    Args:
        targets: hard or soft.
        temperature: of soft targets.
        attention: compares maps, if they are compared.
        weight: of that loss, beside the token's.
    """

    def __init__(
        self,
        targets: str,
        temperature: float,
        attention: AttentionObjective | None = None,
        weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.targets, self.temperature = targets, temperature
        self.attention, self.weight = attention, weight
        self.teacher_taps = Taps()
        if attention is not None:
            self.pairs, self.student_taps = attention.pairs, attention.student_taps
            self.teacher_taps = attention.teacher_taps._replace(logits=True)
            self.curves = ("token_loss", *attention.curves)

    @property
    def stack_key(self) -> Any:
        maps = (
            None if self.attention is None else (self.attention.stack_key, self.attention.loss, self.weight)
        )
        return type(self), self.targets, self.temperature, maps

    def class_logits(self, student: Output) -> Tensor:
        return student.heads["class_token"]

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        logits = student.heads["distillation_token"]
        if self.targets == "soft":
            losses = softened_divergence(logits, teacher.answer, self.temperature)
        else:
            losses = cross_entropy(logits, teacher.predicted)
        token = {"token_loss": losses.unsqueeze(-1)}
        return token if self.attention is None else token | {**self.attention(batch, student, teacher)}

    def transfer(self, terms: Terms) -> Tensor:
        token = terms["token_loss"].squeeze(-1)
        if self.attention is None:
            return token
        maps = {name: values for name, values in terms.items() if name != "token_loss"}
        return token + self.weight * self.attention.transfer(maps)


@dataclass
class TokenDistillation(Method):
    """The student's class token learns labels, its distillation token its teacher's classes."""

    targets: str = "hard"
    """hard, the teacher's class | soft, its probabilities"""
    temperature: float = 3.0
    """of soft targets"""
    attention_weight: float = 0.0
    """Above 0 the student learns its teacher's attention maps too: the loss of `granularity` and `loss` is
    added to the token's with this weight."""

    def __post_init__(self) -> None:
        check_choice(self, "targets", ("hard", "soft"))
        check_positive(self, "temperature")
        is_finite = 0 <= self.attention_weight < math.inf
        check(self, "attention_weight", is_finite, "must be a finite number, 0 or more")

    @property
    def ignores(self) -> tuple[str, ...]:
        of_targets = ("method.temperature",) if self.targets == "hard" else ()
        return of_targets if self.attention_weight else ("granularity", "loss", *of_targets)

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        if not student.has_distillation_token:
            if not hasattr(student, "distillation_token"):
                raise ConfigError(
                    f"student.distillation_token=false: {student} has no such token, which method=token "
                    "teaches; choose one of timm's distilled models, or method=logit"
                )
            raise ConfigError(
                "student.distillation_token=false: method=token teaches that token; set it to true, or "
                "choose method=logit"
            )
        if self.attention_weight:
            part = settings.granularity.part
            check_maps(student, teacher, "method.attention_weight=0", part)
            layouts = student.attention_layouts(part), teacher.attention_layouts(part)
            pairs = settings.granularity.pairs(*layouts)
            check_windows(pairs, student, teacher, "method.attention_weight=0")
            check_grids(pairs, student, teacher, "method.attention_weight=0")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> TokenObjective:
        attention = attention_objective(student, teacher, settings, data) if self.attention_weight else None
        return TokenObjective(self.targets, self.temperature, attention, self.attention_weight)
