"""Raw attention: heads fused into one matrix, its rows as maps over the image, regions of like attention.

Shapes: B images, H heads, T tokens (prefix + h·w), N = h·w patches, L blocks, F features of a patch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vitkd.errors import ConfigError, suggest
from vitkd.methods.maps.activity import activity_clusters
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
    check_grid(matrix, grid, prefix)
    _check_among("tokens", readers, matrix.shape[-1], f"at least one, patches from {prefix} on")
    to_patches = rows_read(matrix, readers)[..., prefix:]
    return (scaled(to_patches) if normalise else to_patches).unflatten(-1, grid)


def cls_attention(
    scores: Tensor,
    grid: int | tuple[int, int],
    heads: Sequence[int] | None = None,
    prefix: int = 1,
    allowed: Tensor | None = None,
    readers: Sequence[int] = (0,),
) -> Tensor:
    """How the class token's attention is spread over the patches, or that of all tokens that are read.

    Args:
        scores: [B, H, T, T] before softmax, the class token first.
        grid: (h, w), or h where w is h.
        heads: those to average, a head named twice counting twice; None for all.
        prefix: tokens before the patches.
        allowed: [T, T], False where the model masks attention; None where it does not.
        readers: the tokens that the classifier reads.

    Returns:
        [B, h, w]: the mean over heads and readers of their weights, scaled to sum 1 over the patches.

    Raises:
        ConfigError: T is not prefix + h·w.
    """
    scores = at_least_float32(scores if heads is None else scores[..., list(heads), :, :])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    height, width = (grid, grid) if isinstance(grid, int) else grid
    return token_map(scores.softmax(-1).mean(-3), (height, width), prefix, readers, normalise=True)


def attention_features(
    weights: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1, readers: Sequence[int] = (0,)
) -> Tensor:
    """The attention that each patch receives in each block, [B, N, 2·L].

    Features 0 … L−1 are the attention received from all tokens, the mean over queries and heads; L … 2·L−1
    that of the tokens that the classifier reads, the mean over these and heads. Each is a share of what all
    patches receive, times N: 1 is the even share in any image, so that many images can be clustered together.

    Args:
        weights: per block [B, H, T, T].
        grid: (h, w).
        prefix: tokens before the patches.
        readers: the tokens that the classifier reads, as `Recording.readers` has them.

    Raises:
        ConfigError: T is not prefix + h·w.
    """
    fused, every_token = [fuse(each) for each in weights], range(weights[0].shape[-1])
    maps = [token_map(each, grid, prefix, who) for who in (every_token, readers) for each in fused]
    features = torch.stack(maps, -1).flatten(1, 2)
    return features.shape[1] * scaled(features, dim=1)


def region_map(features: Tensor, clusters: int, seed: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Labels [B, h, w] from 0, the region that receives least attention, to clusters − 1, the most.

    `activity_clusters` of the patches of all images at once, so that a label means the same in each of them.
    Under uniform attention there is one region.

    Args:
        features: [B, N, F] as `attention_features` gives them: all in one unit, more being more active.
        clusters: k.
        seed: of k-means.
        grid: (h, w); None where patches lie in a square.

    Returns:
        int64 on the features' device.

    Raises:
        ConfigError: k is below 1, or N patches do not fill the grid.
    """
    if clusters < 1:
        raise ConfigError(f"clusters={clusters}: must be at least 1")
    side = math.isqrt(features.shape[1])
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != features.shape[1]:
        raise ConfigError(f"{features.shape[1]} patches do not fill {rows}×{columns}: give their grid")
    points = features.detach().flatten(0, 1).cpu().double().numpy()
    labels = torch.from_numpy(activity_clusters(points, clusters, seed))
    return labels.view(len(features), rows, columns).to(features.device)


def check_grid(matrix: Tensor, grid: tuple[int, int], prefix: int) -> None:
    """Raise ConfigError unless the tokens of matrices [..., T, T] are `prefix` and `grid` patches."""
    tokens, (rows, columns) = matrix.shape[-1], grid
    if tokens != prefix + rows * columns:
        raise ConfigError(f"{tokens} tokens are not {prefix} and {rows}×{columns} patches: give their grid")


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
