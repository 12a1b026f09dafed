"""Distillation through a token (DeiT: Touvron et al. 2021, arXiv 2012.12877, section 4).

The student's class token learns the labels, its distillation token what the teacher says:

    hard  alpha·CE(class token, y) + (1 − alpha)·CE(distillation token, the teacher's class)     (equation 3)
    soft  alpha·CE(class token, y) + (1 − alpha)·T²·KL(teacher ‖ distillation token)             (equation 2)

with both sides of KL softened by the temperature T. The paper's weights weigh the other term. The teacher may
be of any kind. At alpha = 1 training is the student's alone: labels for the mean of both heads.

Shapes: S stacked students (absent for one), B batch, K classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.attention import attention_transfer, check_equal_grids, with_maps
from vitkd.methods.base import Calibration, Distillation, Plan
from vitkd.methods.logit import softened_divergence
from vitkd.methods.maps.objective import AttentionTransfer, Transfer
from vitkd.models import Model, ModelConfig, ModelOutput, ViTConfig
from vitkd.models.base import Answer
from vitkd.models.layers import at_least_float32

TARGETS = ("hard", "soft")


class TokenTransfer(Transfer):
    """Compares what the distillation token says with the teacher, and perhaps attention maps besides.

    Args:
        targets: hard or soft.
        temperature: of soft targets.
        attention: what compares maps, if they are compared.
        weight: of that loss, beside the token's.
    """

    needs_logits = True

    def __init__(
        self,
        targets: str,
        temperature: float,
        attention: AttentionTransfer | None = None,
        weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.targets, self.temperature = targets, temperature
        self.attention, self.weight = attention, weight
        if attention is not None:
            self.pairs, self.streams = attention.pairs, attention.streams

    @property
    def curves(self) -> list[str]:
        return [] if self.attention is None else ["token_loss", *self.attention.curves]

    @property
    def kind(self) -> Any:
        maps = None if self.attention is None else (self.attention.kind, self.attention.loss, self.weight)
        return type(self), self.targets, self.temperature, maps

    def task_logits(self, student: ModelOutput) -> Tensor:
        assert student.of_tokens is not None
        return student.of_tokens.class_token

    def compare(self, student: ModelOutput, teacher: Answer) -> Tensor:
        """The token's value, and one per student map where these are compared, [*S, 1 + P]."""
        assert student.of_tokens is not None
        assert teacher.logits is not None
        says = student.of_tokens.distillation_token
        if self.targets == "soft":
            value = softened_divergence(says, teacher.logits, self.temperature)
        else:
            log_q = at_least_float32(says).log_softmax(-1)
            labels = teacher.predicted.expand(log_q.shape[:-1])
            value = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1, keepdim=True)
        if self.attention is None:
            return value
        return torch.cat([value, self.attention.compare(student, teacher)], dim=-1)

    def total(self, values: Tensor) -> Tensor:
        token = values[..., 0]
        if self.attention is None:
            return token
        return token + self.weight * self.attention.total(values[..., 1:])


@dataclass
class TokenDistillation(Distillation):
    """The student's class token learns labels, its distillation token what the teacher says."""

    targets: str = "hard"
    """hard, the teacher's class | soft, its probabilities"""
    temperature: float = 3.0
    """of soft targets"""
    attention_weight: float = 0.0
    """Above 0 the student learns where its teacher looks, too: so much times the loss of `granularity` and
    `loss` is added to the token's."""

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ConfigError(f"targets={self.targets}: choose {' or '.join(TARGETS)}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: must be a finite number above 0")
        if not 0 <= self.attention_weight < math.inf:
            raise ConfigError(f"attention_weight={self.attention_weight}: must be a finite number, 0 or more")

    @property
    def ignores(self) -> tuple[str, ...]:
        of_targets = ("method.temperature",) if self.targets == "hard" else ()
        return of_targets if self.attention_weight else ("granularity", "loss", *of_targets)

    def check(self, student: ModelConfig, teacher: ModelConfig, plan: Plan) -> None:
        if not isinstance(student, ViTConfig) or not student.distillation_token:
            raise ConfigError(
                "student.distillation_token=false: method=token teaches that token; set it to true, or "
                "choose method=logit"
            )
        if self.attention_weight:
            ours, theirs = with_maps(student, teacher, "method.attention_weight=0")
            plan.granularity.pairs(ours, theirs)
            check_equal_grids(ours, theirs, "method.attention_weight=0")

    def transfer(self, student: Model, teacher: Model, plan: Plan, calibrate: Calibration) -> TokenTransfer:
        attention = attention_transfer(student, teacher, plan, calibrate) if self.attention_weight else None
        return TokenTransfer(self.targets, self.temperature, attention, self.attention_weight)
