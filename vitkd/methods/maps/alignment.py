"""What makes the maps of two models comparable: the same tokens, and agreement on which entries count.

Shapes: N tokens of the maps that are compared, N' of the teacher's before they are resized.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.models import ViTConfig
from vitkd.models.layers import Factors, Scores
from vitkd.models.tokens import token_interpolation, without_tokens

# Where a distillation token stands: behind the class token.
DISTILLATION_TOKEN = 1


class Alignment(NamedTuple):
    """How the maps of a student and a teacher become maps of the same tokens."""

    resize: Tensor | None = None
    """[N, N'] interpolates the teacher's tokens to the student's grid, if they differ"""
    allowed: Tensor | None = None
    """[N, N]: False where either model masks attention; those entries stay out of every mean"""
    drop_from_student: bool = False
    """Whether its distillation token's row and column are left out."""
    drop_from_teacher: bool = False
    """The same of the teacher's."""


AS_THEY_ARE = Alignment()


def align(student: ViTConfig, teacher: ViTConfig) -> Alignment:
    """How to compare their maps.

    A distillation token is left out unless both have one and equal grids. Where one model masks attention, as
    locality attention does a token's to itself, the other's there is not compared either. Losses on weights
    make what is left of a row a whole again.
    """
    resize = None if student.grid == teacher.grid else token_interpolation(teacher.grid, student.grid)
    both = student.distillation_token and teacher.distillation_token and resize is None
    drops = [each.distillation_token and not both for each in (student, teacher)]
    masks = [
        _without(allowed, (-2, -1)) if drop else allowed
        for each, drop in zip((student, teacher), drops, strict=True)
        if (allowed := each.allowed()) is not None
    ]
    return Alignment(resize, torch.stack(masks).all(0) if masks else None, *drops)


def without_distillation_token(scores: Scores) -> Scores:
    """The scores [*S, B, H, N + 1, N + 1] of all tokens but the distillation token, or their factors."""
    if isinstance(scores, Factors):
        return Factors(*(_without(factor, (-2,)) for factor in scores))
    return _without(scores, (-2, -1))


def _without(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """All but the distillation token's entries along `axes`."""
    for axis in axes:
        x = without_tokens(x, axis, DISTILLATION_TOKEN, DISTILLATION_TOKEN + 1)
    return x
