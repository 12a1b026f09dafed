"""Raw attention: heads fused into one matrix, and a token's row of it laid out over the image.

Shapes: B images, H heads, T tokens (prefix + h·w), h × w patches.
"""

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


def rows_read(matrix: Tensor, readers: Sequence[int]) -> Tensor:
    """The mean of these tokens' rows of matrices [..., T, T]: [..., T]."""
    return matrix[..., [*readers], :].mean(-2)


def _check_heads(heads: Sequence[int], count: int) -> None:
    wrong = [head for head in heads if not 0 <= head < count]
    if wrong or not heads:
        shown = ", ".join(map(str, wrong)) or "none"
        raise ConfigError(f"heads {shown}: must be among 0 to {count - 1}, at least one")
