"""How alike two attention maps are, and how far apart the places are that one attends to.

All maps are attention weights after the softmax. Where a metric is undefined (the rank correlation of a row
of equal weights, for one) it is NaN.

Shapes: B images, H heads, M maps (any number of axes), T tokens (prefix + h·w), N = h·w patches, L blocks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import rows_read
from vitkd.models.output import at_least_float32

COMPARISONS = ("kl", "js", "spearman", "top_k_iou", "cls_overlap")
"""of two maps; `kl` and `js` fall with fidelity, the others rise with it"""


class Reading(NamedTuple):
    """What comparisons need of maps, computed once for a map that is compared with many."""

    weights: Tensor
    """[B, ...M, T, T]"""
    log: Tensor
    """[B, ...M, T, T]"""
    row: Tensor
    """[B, ...M, N]: the class row over patches, summing to 1"""
    ranks: Tensor
    """[B, ...M, N]: the ranks of `row`, centred and of norm 1"""
    top: Tensor
    """[B, ...M, N] bool: the k patches with most weight in `row`; of equal ones the first"""


def compare(
    student: Tensor, teacher: Tensor, *, prefix: int = 1, k: int | None = None, readers: Sequence[int] = (0,)
) -> dict[str, Tensor]:
    """How alike two maps are: each metric [B, ...M], for each image.

    The class row is that of the class token, or the mean of the rows that the classifier reads.

    - `kl`: KL(teacher ‖ student) in nats, mean over query rows. A weight of the student that underflowed to
      0 counts as the smallest normal number, so that the divergence stays finite.
    - `js`: the Jensen-Shannon divergence in nats, mean over query rows, at most log 2.
    - `spearman`: rank correlation of the class rows over patches, ties sharing their mean rank; NaN if all
      weights of a row are equal.
    - `top_k_iou`: intersection over union of the k patches with the highest weight in the class rows.
    - `cls_overlap`: Σ min(p, q) of the class rows, renormalised over patches: 1 if equal, 0 if disjoint; NaN
      if a row gives the patches nothing.

    Args:
        student, teacher: [B, ...M, T, T], the student's and the teacher's, rows summing to 1.
        prefix: tokens before the patches.
        k: a quarter of the patches, at least one, if None.
        readers: the tokens that the classifier reads, as `Recording.readers` has them.

    Raises:
        ConfigError: k is not 1 to N.
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"maps of shapes {[*student.shape]} and {[*teacher.shape]} cannot be compared")
    return compare_readings(read(student, prefix, k, readers), read(teacher, prefix, k, readers))


def read(weights: Tensor, prefix: int = 1, k: int | None = None, readers: Sequence[int] = (0,)) -> Reading:
    """A `Reading` of attention weights [B, ...M, T, T]; the arguments are those of `compare`."""
    p = at_least_float32(weights)
    row = rows_read(p, readers)[..., prefix:].contiguous()
    descending, order = row.sort(stable=True, dim=-1, descending=True)
    top = torch.zeros_like(row, dtype=torch.bool)
    top.scatter_(-1, order[..., : _top_count(k, row.shape[-1])], True)
    ranks = _unit_ranks(row, descending.flip(-1))
    return Reading(p, _log(p), row / row.sum(-1, keepdim=True), ranks, top)


def compare_readings(student: Reading, teacher: Reading) -> dict[str, Tensor]:
    """`compare` for maps that were read before."""
    q, p = student.weights, teacher.weights
    log_mean = _log((p + q) / 2)
    js = (p * (teacher.log - log_mean) + q * (student.log - log_mean)).sum(-1) / 2
    shared, either = (student.top & teacher.top).sum(-1), (student.top | teacher.top).sum(-1)
    # Rounding leaves some values slightly outside their bounds.
    return {
        "kl": (p * (teacher.log - student.log)).sum(-1).mean(-1).clamp_min(0),
        "js": js.mean(-1).clamp(0, math.log(2)),
        "spearman": (student.ranks * teacher.ranks).sum(-1).clamp(-1, 1),
        "top_k_iou": shared.to(p.dtype) / either,
        "cls_overlap": torch.minimum(student.row, teacher.row).sum(-1).clamp_max(1),
    }


def entropy(weights: Tensor) -> Tensor:
    """The entropy in nats of attention weights [B, ...M, T, T], mean over queries: [B, ...M], 0 to log T."""
    p = at_least_float32(weights)
    return (p * -_log(p)).sum(-1).mean(-1).clamp_min(0)


def mean_distance(
    weights: Tensor, grid: tuple[int, int], patch_size: float | tuple[float, float], prefix: int = 1
) -> Tensor:
    """Mean attention distance [B, ...M] in pixels (Dosovitskiy et al. 2020, figure 7).

    Σ_j w_ij·|centre_i − centre_j| over patches, each row renormalised over them, mean over query patches.
    A query that gives the patches nothing does not count; NaN if none gives them anything.

    Args:
        weights: [B, ...M, T, T].
        grid: (h, w).
        patch_size: the pixels of a patch's side, or (height, width).
        prefix: tokens before the patches, which are left out as queries and as keys.

    Raises:
        ValueError: T is not prefix + h·w.
    """
    if weights.shape[-1] != prefix + grid[0] * grid[1]:
        raise ValueError(f"{weights.shape[-1]} tokens are not {prefix} and {grid[0]}×{grid[1]} patches")
    patches = at_least_float32(weights)[..., prefix:, prefix:]
    distances = patch_distances(grid, patch_size).to(patches)
    return ((patches * distances).sum(-1) / patches.sum(-1)).nanmean(-1)


def patch_distances(grid: tuple[int, int], patch_size: float | tuple[float, float] = 1.0) -> Tensor:
    """Distances [N, N] in pixels between the centres of h × w patches; float64, on the CPU."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int | float) else patch_size
    down = torch.arange(grid[0], dtype=torch.float64) * height
    across = torch.arange(grid[1], dtype=torch.float64) * width
    centres = torch.cartesian_prod(down, across)
    return (centres[:, None] - centres).square().sum(-1).sqrt()


def uniform_distance(grid: tuple[int, int], patch_size: float | tuple[float, float] = 1.0) -> float:
    """The mean attention distance in pixels of attention that gives all patches the same."""
    return patch_distances(grid, patch_size).mean().item()


def locality(weights: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """How far each block and head attends over square patches, relative to uniform attention: [B, L, H].

    0 is a token that attends to itself alone, 1 the mean distance of uniform attention. In ViTs trained on
    much data some heads of the low blocks are near 0; with little data these hardly learn local relations
    (Zhu et al. 2023). The mean over the last axis is the block's. NaN for a single patch.

    Args:
        weights: per block [B, H, T, T].
        grid: (h, w).
        prefix: tokens before the patches.
    """
    distances = [mean_distance(each, grid, 1, prefix) for each in weights]
    return torch.stack(distances, 1) / uniform_distance(grid)


def _top_count(k: int | None, patches: int) -> int:
    if k is None:
        return max(patches // 4, 1)
    if not 1 <= k <= patches:
        raise ConfigError(f"k={k}: there are {patches} patches, so choose 1 to {patches}")
    return k


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _unit_ranks(values: Tensor, ascending: Tensor) -> Tensor:
    """Ranks of `values` [..., N], centred and of norm 1, ties sharing their mean; NaN if all are equal.

    `ascending` holds the values in order. The inner product of two such is Spearman's coefficient.
    """
    # Twice the rank, less a constant: below and up to each value.
    ends = [torch.searchsorted(ascending, values, right=right) for right in (False, True)]
    centred = (ends[0] + ends[1] - values.shape[-1]).to(values.dtype)
    return centred / centred.square().sum(-1, keepdim=True).sqrt()
