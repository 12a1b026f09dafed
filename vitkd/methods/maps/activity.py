"""Parts of images by how much attention they receive.

Shapes: B images, H heads, T tokens (prefix + h·w patches), F features (a head of a block each), n points.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitkd.models import Model

IMAGES_AT_ONCE = 4
"""all blocks' maps of so many are in memory together"""
RESTARTS = 10
"""k-means runs, of which the best counts"""
DECIMALS = 5
"""Activities are distinguished to a hundred-thousandth of the highest: below that is float32's rounding."""


@torch.no_grad()
def patch_activity(model: Model, images: Tensor) -> Tensor:
    """The attention that each patch receives in each block and head, [F, h, w] float64 on the CPU.

    It is the mean over queries and images [B, C, H, W] of the attention weights, as a share of what all
    patches receive, times their number: 1 is the even share. The model, a ViT, is set to eval mode.
    """
    layout = model.attention[0]
    sums: list[Tensor] | None = None
    for some in images.split(IMAGES_AT_ONCE):
        weights = model.eval().trace(some).weights
        received = [each.double().mean(-2).sum(0)[:, layout.prefix :].cpu() for each in weights]
        sums = received if sums is None else [a + b for a, b in zip(sums, received, strict=True)]
    assert sums is not None, "no images"
    activity = torch.cat(sums)
    return (activity / activity.mean(-1, keepdim=True)).unflatten(-1, layout.grid)


def activity_clusters(points: NDArray[np.float64], count: int, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of each of n points [n, F], from 0, the least active, to count − 1, the most: [n].

    k-means (Lloyd 1982, from k-means++). Clusters are ordered by the mean of their centre's features, which
    are all in one unit, more being more active. Where fewer points than `count` are distinct, there are as
    many clusters as distinct points.
    """
    from sklearn.cluster import KMeans  # takes a while to import

    rounded = np.round(points / (np.abs(points).max() or 1), DECIMALS)
    distinct = len(np.unique(rounded, axis=0))
    means = KMeans(min(count, distinct), n_init=RESTARTS, random_state=seed).fit(rounded)
    rank: NDArray[np.int64] = means.cluster_centers_.mean(1).argsort(kind="stable").argsort()
    return rank[means.labels_]


def patches_of_clusters(clusters: NDArray[np.int64], region_size: int) -> Sequence[list[int]]:
    """By cluster its patches, counted row by row, of the clusters [rows, columns] of square regions."""
    of_patches = clusters.repeat(region_size, 0).repeat(region_size, 1).ravel()
    return [np.flatnonzero(of_patches == cluster).tolist() for cluster in range(clusters.max() + 1)]
