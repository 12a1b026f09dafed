"""What makes the maps of two models comparable: the same tokens, and agreement on which entries count.

Shapes: N tokens of the maps that are compared, N' of the teacher's before they are resized.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.models import AttentionLayout
from vitkd.models.output import QKV
from vitkd.models.tokens import token_interpolation, without_tokens


class Alignment(NamedTuple):
    """How the maps of a student block and a teacher block become maps of the same tokens."""

    resize: Tensor | None = None
    """[N, N'] interpolates the teacher's tokens to the student's grid, if they differ"""
    allowed: Tensor | None = None
    """[N, N]: False where either model masks attention; those entries stay out of every mean"""
    dropped_from_student: int = 0
    """how many tokens after the class token have their rows and columns left out"""
    dropped_from_teacher: int = 0
    """the same of the teacher's"""

    def to(self, device: torch.device) -> "Alignment":
        """The same on `device`."""
        resize, allowed = (None if tensor is None else tensor.to(device) for tensor in self[:2])
        return self._replace(resize=resize, allowed=allowed)


AS_THEY_ARE = Alignment()


def align(student: AttentionLayout, teacher: AttentionLayout) -> Alignment:
    """How to compare the maps of two blocks.

    Tokens between the class token and the patches, a distillation token for example, are left out unless both
    have as many and equal grids. Where one model masks attention, as locality attention does a token's to
    itself, the other's there is not compared either. Losses on weights normalise what is left of a row.
    """
    resize = None if student.grid == teacher.grid else token_interpolation(teacher.grid, student.grid)
    keep = student.prefix == teacher.prefix and resize is None
    dropped = [0 if keep else layout.prefix - 1 for layout in (student, teacher)]
    masks = [
        drop_prefix(layout.mask, count, (-2, -1))
        for layout, count in zip((student, teacher), dropped, strict=True)
        if layout.mask is not None
    ]
    return Alignment(resize, torch.stack(masks).all(0) if masks else None, *dropped)


def without_prefix(maps: Tensor | QKV, count: int) -> Tensor | QKV:
    """Scores [*S, B, H, T, T], or their factors, without the first `count` tokens after the class token."""
    if isinstance(maps, QKV):
        return maps.map(lambda factor: drop_prefix(factor, count))
    return drop_prefix(maps, count, (-2, -1))


def drop_prefix(x: Tensor, count: int, axes: tuple[int, ...] = (-2,)) -> Tensor:
    """All but the entries of `count` tokens after the class token along `axes`."""
    for axis in axes if count else ():
        x = without_tokens(x, axis, 1, 1 + count)
    return x
