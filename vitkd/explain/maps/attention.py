"""Raw attention: heads fused into one matrix, and a token's row of it as a map over the image.

Shapes: B images, H heads, T tokens (prefix + h·w), h × w patches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vitkd.errors import ConfigError, suggest
from vitkd.models.output import at_least_float32

Fusion = Literal["mean", "max", "min"]

FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda weights: weights.mean(1),
    "max": lambda weights: weights.amax(1),
    "min": lambda weights: weights.amin(1),
}


def fuse(weights: Tensor, how: Fusion = "mean", heads: Sequence[int] | None = None) -> Tensor:
    """Attention weights [B, H, T, T] as one matrix [B, T, T] an image.

    Args:
        how: the mean, the maximum or the minimum over heads, entry by entry.
        heads: those that count; one for that head's own matrix, None for all.

    Raises:
        ConfigError: there is no such fusion or head.
    """
    if how not in FUSIONS:
        raise ConfigError(f"head fusion {how}: {suggest(how, FUSIONS)}")
    if heads is not None:
        _check_among("heads", heads, weights.shape[1], "at least one")
        weights = weights[:, [*heads]]
    return FUSIONS[how](at_least_float32(weights))


def token_map(
    matrix: Tensor,
    grid: tuple[int, int],
    prefix: int = 1,
    readers: Sequence[int] = (0,),
    normalise: bool = False,
) -> Tensor:
    """What tokens give to the patches, of matrices [..., T, T], as maps [..., h, w].

    Args:
        grid: (h, w).
        prefix: tokens before the patches.
        readers: the tokens whose rows are read, and averaged if they are several: `Recording.readers` for
            what the classifier reads.
        normalise: scale each map to sum 1.

    Raises:
        ConfigError: T is not prefix + h·w, or there is no such token.
    """
    tokens, (rows, columns) = matrix.shape[-1], grid
    if tokens != prefix + rows * columns:
        raise ConfigError(f"{tokens} tokens are not {prefix} and {rows}×{columns} patches: give their grid")
    _check_among("tokens", readers, tokens, f"at least one, patches from {prefix} on")
    to_patches = rows_read(matrix, readers)[..., prefix:]
    return (scaled(to_patches) if normalise else to_patches).unflatten(-1, grid)


def cls_attention(
    scores: Tensor,
    grid: int,
    heads: Sequence[int] | None = None,
    prefix: int = 1,
    allowed: Tensor | None = None,
) -> Tensor:
    """How the class token's attention is spread over the patches, or its mean with a distillation token's.

    Args:
        scores: [B, H, T, T] before softmax, the class token first.
        grid: g.
        heads: those to average, a head named twice counting twice; None for all.
        prefix: tokens before the patches, all of which the classifier reads: the class token, or that and the
            distillation token.
        allowed: [T, T], False where the model masks attention; None where it does not.

    Returns:
        [B, g, g]: the mean over heads and these tokens of their weights, scaled to sum 1 over the patches.

    Raises:
        ConfigError: T is not prefix + g².
    """
    rows = at_least_float32(scores[..., :prefix, :])
    rows = rows if heads is None else rows[..., list(heads), :, :]
    if allowed is not None:
        rows = rows.masked_fill(~allowed[:prefix], -math.inf)
    return token_map(rows.softmax(-1).mean(-3), (grid, grid), prefix, range(prefix), normalise=True)


def rows_read(matrix: Tensor, readers: Sequence[int]) -> Tensor:
    """The mean of these tokens' rows of matrices [..., T, T]: [..., T]."""
    return matrix[..., [*readers], :].mean(-2)


def scaled(weights: Tensor, dim: int = -1) -> Tensor:
    """Weights scaled to sum 1 along `dim`; where there is nothing, 0 rather than 0/0."""
    total = weights.sum(dim, keepdim=True)
    return weights / total.clamp_min(torch.finfo(total.dtype).tiny)


def _check_among(what: str, numbers: Sequence[int], count: int, more: str) -> None:
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        shown = ", ".join(map(str, wrong)) or "none"
        raise ConfigError(f"{what} {shown}: must be 0 to {count - 1}, {more}")
