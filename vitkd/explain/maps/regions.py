"""Regions of an image by how much attention they receive, from the least to the most.

Shapes: B images, H heads, T tokens (prefix + h·w), N = h·w patches, L blocks, F features of a patch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import rows_read, scaled
from vitkd.models.output import at_least_float32

RESTARTS = 10
"""k-means runs, of which the best counts"""
DECIMALS = 5
"""Activities are distinguished to a hundred-thousandth of the highest: below that is float32's rounding."""


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
        ValueError: T is not prefix + h·w.
    """
    patches = grid[0] * grid[1]
    if weights[0].shape[-1] != prefix + patches:
        raise ValueError(f"{weights[0].shape[-1]} tokens are not {prefix} and {grid[0]}×{grid[1]} patches")
    of_heads = [at_least_float32(each).mean(1) for each in weights]
    received = [each.mean(-2) for each in of_heads]
    read = [rows_read(each, readers) for each in of_heads]
    return patches * scaled(torch.stack(received + read, -1)[:, prefix:], dim=1)


def region_map(features: Tensor, clusters: int, seed: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Labels [B, h, w] from 0, the region that receives least attention, to clusters − 1, the most.

    k-means (Lloyd 1982, from k-means++) over the patches of all images at once, so that a label means the
    same in each of them. Regions are ordered by the mean of their centre's features. Where patches have fewer
    distinct features than `clusters`, there are as many regions as distinct features: one under uniform
    attention.

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
    points = np.round(points / (np.abs(points).max() or 1), DECIMALS)
    labels, centres = _cluster(points, clusters, seed)
    rank = centres.mean(1).argsort(kind="stable").argsort()
    return torch.from_numpy(rank[labels]).view(len(features), rows, columns).to(features.device)


def _cluster(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [B·N] and centres [k, F], k at most the number of distinct points."""
    from sklearn.cluster import KMeans  # takes a while to import

    # A few points are quickly compared, and hardly ever have fewer distinct ones than clusters.
    few = np.unique(points[: 100 * clusters], axis=0)
    distinct = len(few) if len(few) >= clusters else len(np.unique(points, axis=0))
    means = KMeans(min(clusters, distinct), n_init=RESTARTS, random_state=seed).fit(points)
    return means.labels_, means.cluster_centers_
