"""What makes the maps of two models comparable: the same tokens, and agreement on which entries count.

Shapes: N tokens of the maps that are compared, N' of the teacher's before they are resized.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.models import AttentionLayout
from vitkd.models.output import QKV, shown


class Alignment(NamedTuple):
    """How the maps of a student block and a teacher block become maps of the same tokens."""

    resize: Tensor | None = None
    """[N, N'] interpolates the teacher's tokens to the student's grid, if they differ"""
    allowed: Tensor | None = None
    """[Q, K]: False where either model masks attention; those entries stay out of every mean"""
    dropped_from_student: int = 0
    """how many tokens have their rows and columns left out, after the `kept` first"""
    dropped_from_teacher: int = 0
    """the same of the teacher's"""
    kept: int = 1
    """1, the class token, or 0 where a model has none"""
    heads: Tensor | None = None
    """[P, H] makes each of P target scores a weighted sum of those of H teacher heads, if they are weighed"""

    def to(self, device: torch.device) -> "Alignment":
        """The same on `device`."""
        tensors = {name: getattr(self, name) for name in ("resize", "allowed", "heads")}
        return self._replace(**{name: each.to(device) for name, each in tensors.items() if each is not None})


AS_THEY_ARE = Alignment()


def how_windows_differ(student: AttentionLayout, teacher: AttentionLayout) -> str | None:
    """Why two blocks attend within different windows; None if both have the same, or none."""
    if student.windows == teacher.windows == 1:
        return None
    wholes, parts = student.names
    if reason := how_grids_differ(student, teacher):
        return reason
    windows = [layout.window or layout.grid for layout in (student, teacher)]
    if windows[0] != windows[1]:
        return f"{wholes} of {shown(windows[0])} {parts} are not those of {shown(windows[1])}"
    masks = [layout.mask for layout in (student, teacher) if layout.mask is not None]
    if len(masks) == 1 or (masks and not torch.equal(*masks)):
        return "only one of the two shifts its windows"
    return None


def how_grids_differ(student: AttentionLayout, teacher: AttentionLayout) -> str | None:
    """Why two blocks have other patches; None if they have the same."""
    if student.grid == teacher.grid:
        return None
    return f"{shown(student.grid)} {student.names[1]} are not {shown(teacher.grid)}"


def align(student: AttentionLayout, teacher: AttentionLayout) -> Alignment:
    """How to compare the maps of two blocks.

    Tokens between the class token and the patches, a distillation token for example, are left out unless both
    have as many and equal grids; so is the class token if only one model has it. Where one model masks
    attention, as locality attention does a token's to itself, the other's there is not compared either.
    Losses on weights normalise what is left of a row. Windows have to be the same.
    """
    assert how_windows_differ(student, teacher) is None
    resize = None if student.grid == teacher.grid else token_interpolation(teacher.grid, student.grid)
    kept = int(student.has_class_token and teacher.has_class_token)
    prefixes = [(layout.prefix, layout.has_class_token) for layout in (student, teacher)]
    keeps_all = prefixes[0] == prefixes[1] and resize is None
    dropped = [0 if keeps_all else layout.prefix - kept for layout in (student, teacher)]
    masks = [
        without_tokens(layout.mask, kept, kept + count, (-2, -1))
        for layout, count in zip((student, teacher), dropped, strict=True)
        if layout.mask is not None
    ]
    allowed = torch.stack(masks).all(0) if masks else None
    return Alignment(resize, allowed, dropped[0], dropped[1], kept)


def without_prefix(maps: Tensor | QKV, count: int, kept: int = 1) -> Tensor | QKV:
    """Scores [*S, B, H, T, T], or their factors, without the `count` tokens after the `kept` first."""
    if isinstance(maps, QKV):
        return maps.map(lambda factor: without_tokens(factor, kept, kept + count))
    return without_tokens(maps, kept, kept + count, (-2, -1))


def without_tokens(x: Tensor, start: int, stop: int, axes: tuple[int, ...] = (-2,)) -> Tensor:
    """All entries along the token axes but those of the tokens `start` to `stop` − 1."""
    for axis in axes if stop > start else ():
        rest = x.narrow(axis, stop, x.shape[axis] - stop)
        x = torch.cat([x.narrow(axis, 0, start), rest], dim=axis)
    return x


def token_interpolation(from_grid: tuple[int, int], to_grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """The matrix [prefix + patches of to_grid, prefix + patches of from_grid] that resizes tokens bilinearly.

    The prefix, as a rule the class token, stays as it is. Each row sums to 1.
    """
    patches = prod(from_grid)
    basis = torch.eye(patches).reshape(patches, 1, *from_grid)
    resized = F.interpolate(basis, size=to_grid, mode="bilinear", align_corners=False)
    return torch.block_diag(torch.eye(prefix), resized.reshape(patches, prod(to_grid)).T)


def resized_weights(weights: Tensor, matrix: Tensor, prefix: int = 1) -> Tensor:
    """Attention weights [..., N, N] on another token grid, rows summing to 1: [..., N', N'].

    Queries are interpolated by `matrix` [N', N] of `token_interpolation`. A key's weight is spread over the
    patches of its area, so that the class token keeps its share.
    """
    area = torch.ones_like(matrix[:, :1])
    area[prefix:] = (matrix.shape[1] - prefix) / (matrix.shape[0] - prefix)
    mixed = matrix @ weights @ (area * matrix).mT
    return mixed / mixed.sum(-1, keepdim=True)
