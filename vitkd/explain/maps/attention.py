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
        _check_heads(heads, weights.shape[1])
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
    wrong = [reader for reader in readers if not 0 <= reader < tokens]
    if wrong or not readers:
        shown = ", ".join(map(str, wrong)) or "none"
        raise ConfigError(
            f"tokens {shown}: must be 0 to {tokens - 1}, at least one, patches from {prefix} on"
        )
    to_patches = rows_read(matrix, readers)[..., prefix:]
    if normalise:
        # A token that gives all to itself has an empty map rather than 0/0.
        total = to_patches.sum(-1, keepdim=True)
        to_patches = to_patches / total.clamp_min(torch.finfo(total.dtype).tiny)
    return to_patches.unflatten(-1, grid)


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
        ValueError: T is not prefix + g².
    """
    if scores.shape[-1] != prefix + grid**2:
        raise ValueError(f"{scores.shape[-1]} tokens are not {prefix} and {grid}×{grid} patches")
    rows = at_least_float32(scores[..., :prefix, :])
    rows = rows if heads is None else rows[..., list(heads), :, :]
    if allowed is not None:
        rows = rows.masked_fill(~allowed[:prefix], -math.inf)
    weights = rows.softmax(-1).mean((-3, -2))[..., prefix:]
    # A class token that looks at itself alone gives an empty map rather than 0/0.
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights / total).unflatten(-1, (grid, grid))


def rows_read(matrix: Tensor, readers: Sequence[int]) -> Tensor:
    """The mean of these tokens' rows of matrices [..., T, T]: [..., T]."""
    return matrix[..., [*readers], :].mean(-2)


def _check_heads(heads: Sequence[int], count: int) -> None:
    wrong = [head for head in heads if not 0 <= head < count]
    if wrong or not heads:
        shown = ", ".join(map(str, wrong)) or "none"
        raise ConfigError(f"heads {shown}: must be among 0 to {count - 1}, at least one")
