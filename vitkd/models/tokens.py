"""Attention maps and tokens of one model laid out as another's: tokens left out, patches on another grid."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def without_tokens(x: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """All entries along the token axis `axis` but those of the tokens `start` to `stop` − 1."""
    rest = x.narrow(axis, stop, x.shape[axis] - stop)
    return torch.cat([x.narrow(axis, 0, start), rest], dim=axis)


def token_interpolation(from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """The matrix [1 + patches of to_grid, 1 + patches of from_grid] that resizes a token axis bilinearly.

    The class token stays as it is. Each row sums to 1.
    """
    patches = prod(from_grid)
    basis = torch.eye(patches).reshape(patches, 1, *from_grid)
    resized = F.interpolate(basis, size=to_grid, mode="bilinear", align_corners=False)
    return torch.block_diag(torch.ones(1, 1), resized.reshape(patches, prod(to_grid)).T)


def resized_weights(weights: Tensor, matrix: Tensor) -> Tensor:
    """Attention weights [..., N, N] on another token grid, rows summing to 1: [..., N', N'].

    Queries are interpolated by `matrix` [N', N] of `token_interpolation`. A key's weight is spread over the
    patches of its area, so that the class token keeps its share.
    """
    area = torch.ones_like(matrix[:, :1])
    area[1:] = (matrix.shape[1] - 1) / (matrix.shape[0] - 1)
    mixed = matrix @ weights @ (area * matrix).mT
    return mixed / mixed.sum(-1, keepdim=True)
