"""Attention within windows (Swin) as sparse matrices of the image's tokens.

A block's attention is the T×T matrix A: in row i stand token i's weights of the N tokens of its window, each
in the column of where that stood before the cyclic shift, and zeros elsewhere, also where only the shift made
two tokens neighbours, which the model masks. Patch merging is the matrix M of a row for each merged token,
with ¼ at each of the four that it was made of. The classifier reads the mean of the last block's tokens, the
row 1ᵀ/T. Neither A nor M is ever written out: rows are multiplied with them by their indices.

Shapes: B images, H heads, R rows, T tokens of a block, W windows of N tokens, h × w patches of the image.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.models.output import AttentionLayout


class Windows(NamedTuple):
    """Which of a block's tokens attend among themselves."""

    grid: tuple[int, int]
    """tokens from top to bottom and from left to right"""
    tokens: Tensor
    """[W, N] each window's tokens, numbered row by row of the grid, in the order of the block's weights"""


def windows_of(layout: AttentionLayout) -> Windows:
    """Where the windows of a block lie in the image, its cyclic shift undone."""
    assert layout.window is not None
    (rows, columns), (height, width) = layout.grid, layout.window
    down, across = layout.shift
    shifted = torch.arange(rows * columns).view(rows, columns).roll((-down, -across), (0, 1))
    tiles = shifted.view(rows // height, height, columns // width, width).transpose(1, 2)
    return Windows(layout.grid, tiles.reshape(-1, height * width))


def identity(windows: Windows, like: Tensor) -> Tensor:
    """I as a block's weights are laid out [W·N, N], of the type of `like`."""
    count, size = windows.tokens.shape
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(count, 1)


def times(rows: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """rows · A [..., R, T], of rows [..., R, T] and a block's weights [..., W·N, N]."""
    inside = weights.unflatten(-2, windows.tokens.shape)
    products = torch.einsum("...rwq,...wqk->...rwk", rows[..., windows.tokens], inside)
    return products.flatten(-2)[..., windows.tokens.flatten().argsort()]


def unmerged(rows: Tensor, merged: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """rows · M [..., T], of rows over the `merged` tokens that a `grid` became; unchanged if the two are one.

    At the border of an odd grid a token is made of two or of one, which share what four do elsewhere.
    """
    if merged == grid:
        return rows
    parents = _parents(merged, grid)
    return (rows / parents.bincount().to(rows))[..., parents]


def on_patches(rows: Tensor, windows: Sequence[Windows]) -> Tensor:
    """Rows [..., T] over the tokens of the last block of `windows`, the first blocks, as maps [..., h, w].

    A merged token's value is split evenly among the patches that it was made of.
    """
    for above, below in pairwise(block.grid for block in reversed(windows)):
        rows = unmerged(rows, above, below)
    return rows.unflatten(-1, windows[0].grid)


def pooling_row(windows: Windows, like: Tensor) -> Tensor:
    """1ᵀ/T [1, T], by which global average pooling reads a block's tokens, of the type of `like`."""
    tokens = windows.tokens.numel()
    return torch.full((1, tokens), 1 / tokens, dtype=like.dtype, device=like.device)


def received(weights: Tensor, windows: Sequence[Windows]) -> Tensor:
    """The mean attention that each patch receives in the last block of `windows`: maps [..., h, w].

    1ᵀ/T · A on the patches; where the rows of A sum to 1, so does the map.

    Args:
        weights: [..., W·N, N] of that block.
        windows: of the first blocks up to that one.
    """
    row = times(pooling_row(windows[-1], weights), weights, windows[-1])
    return on_patches(row.squeeze(-2), windows)


def given(weights: Tensor, windows: Sequence[Windows]) -> Tensor:
    """What each patch gives to every patch in the last block of `windows`: [..., h·w, h, w].

    A patch asks as the token that it has become part of.

    Args:
        weights: [..., W·N, N] of that block.
        windows: of the first blocks up to that one.
    """
    own = torch.eye(windows[-1].tokens.numel(), dtype=weights.dtype, device=weights.device)
    maps = on_patches(times(own, weights, windows[-1]), windows)
    return maps[..., _part_of(windows), :, :]


def of_blocks(
    read: Callable[[Tensor, Sequence[Windows]], Tensor], weights: Sequence[Tensor], windows: Sequence[Windows]
) -> list[Tensor]:
    """`received` or `given` of every block."""
    return [read(each, windows[: block + 1]) for block, each in enumerate(weights)]


def _part_of(windows: Sequence[Windows]) -> Tensor:
    """[h·w] which token of the last block of `windows` each patch has become part of."""
    tokens = torch.arange(windows[-1].tokens.numel())
    for above, below in pairwise(block.grid for block in reversed(windows)):
        if above != below:
            tokens = tokens[_parents(above, below)]
    return tokens


def _parents(merged: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[T] the merged token that each token of `grid` became part of."""
    down, across = (torch.arange(count) // 2 for count in grid)
    return (down[:, None] * merged[1] + across).flatten()
