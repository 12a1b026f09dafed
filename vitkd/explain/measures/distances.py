"""How alike two attention maps or two models' features are, and how far apart the places one attends to.

All maps are attention weights after the softmax. Where a metric is undefined (the rank correlation of a row
of equal weights, for one) it is NaN.

Shapes: B images, H heads, M maps (any number of axes), T tokens (prefix + h·w), N = h·w patches, L blocks;
of windows W windows of N tokens each; of features, N examples (images times tokens), D and D' features.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import check_grid, rows_read
from vitkd.explain.maps.windows import Windows, pooling_row, times
from vitkd.models.output import at_least_float32

COMPARISONS = ("kl", "js", "spearman", "top_k_iou", "cls_overlap")
"""of two maps; `kl` and `js` fall with fidelity, the others rise with it"""


class Reading(NamedTuple):
    """What comparisons need of maps, computed once for a map that is compared with many."""

    weights: Tensor
    """[B, ...M, T, T], within windows [B, ...M, W·N, N]"""
    log: Tensor
    """of the same shape"""
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
    return _reading(p, rows_read(p, readers)[..., prefix:].contiguous(), k)


def read_within(weights: Tensor, windows: Windows, k: int | None = None) -> Reading:
    """As `read`, of attention within windows [B, ...M, W·N, N]; the class row is what all tokens give."""
    p = at_least_float32(weights)
    return _reading(p, times(pooling_row(windows, p), p, windows).squeeze(-2), k)


def _reading(p: Tensor, row: Tensor, k: int | None) -> Reading:
    """The `Reading` of weights and of their class row [B, ...M, N] over patches."""
    patches = row.shape[-1]
    k = max(patches // 4, 1) if k is None else k
    if not 1 <= k <= patches:
        raise ConfigError(f"k={k}: there are {patches} patches, so choose 1 to {patches}")
    descending, order = row.sort(stable=True, dim=-1, descending=True)
    top = torch.zeros_like(row, dtype=torch.bool).scatter(-1, order[..., :k], True)
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
        ConfigError: T is not prefix + h·w.
    """
    check_grid(weights, grid, prefix)
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


def windowed_locality(weights: Sequence[Tensor], windows: Sequence[Windows]) -> Tensor:
    """As `locality`, of attention within windows, over each block's own tokens: [B, L, H].

    H is the most heads that a block has; NaN for those that another has not, and for a block of one token.

    Args:
        weights: per block [B, heads, W·N, N].
        windows: of every block.
    """
    blocks = [_within(each, place) for each, place in zip(weights, windows, strict=True)]
    heads = max(each.shape[1] for each in blocks)
    filled = [pad(each, (0, heads - each.shape[1]), value=math.nan) for each in blocks]
    return torch.stack(filled, 1)


def _within(weights: Tensor, windows: Windows) -> Tensor:
    """A block's distance [B, heads] relative to that of uniform attention over all of its tokens."""
    return windowed_distance(weights, windows) / (uniform_distance(windows.grid) or math.nan)


def windowed_distance(
    weights: Tensor, windows: Windows, patch_size: float | tuple[float, float] = 1.0
) -> Tensor:
    """`mean_distance` [B, ...M] in pixels of attention within windows [B, ...M, W·N, N]."""
    of_pairs = patch_distances(windows.grid, patch_size)
    inside = of_pairs[windows.tokens[:, :, None], windows.tokens[:, None]].flatten(0, 1)
    return (at_least_float32(weights) * inside.to(weights)).sum(-1).mean(-1)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features [N, D] and [N, D'] of the same N examples, 0 to 1.

    ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, the features centred (Kornblith et al. 2019): unmoved by
    rotation and isotropic scaling of either. NaN if the features of either are constant.
    """
    sums = CKASums([("x", "y")])
    sums.add({"x": x, "y": y})
    return sums.value("x", "y")


class CKASums:
    """`linear_cka` of named features over batches: only D × D' matrices are kept, however many examples.

    Args:
        pairs: the names that are compared with each other.
    """

    def __init__(self, pairs: Sequence[tuple[Hashable, Hashable]]) -> None:
        self._names = [*dict.fromkeys(name for pair in pairs for name in pair)]
        self._pairs = [*dict.fromkeys([*pairs, *((name, name) for name in self._names)])]
        self._origins: dict[Hashable, Tensor] = {}
        """[D]: the first batch's mean, which is subtracted so that nothing cancels in Σxyᵀ − n·x̄ȳᵀ"""
        self._products: dict[tuple[Hashable, Hashable], Tensor] = {}
        """[D + 1, D' + 1]: Σxyᵀ of features with a 1 after them, so that Σx, Σy and n are in it"""

    def add(self, features: Mapping[Any, Tensor]) -> None:
        """Add features [..., D] of the same examples under their names, for instance tokens [B, T, D].

        Raises ValueError if the examples cannot be the same.
        """
        first = features[self._names[0]]
        for name in self._names:
            if features[name].shape[:-1] != first.shape[:-1]:
                shapes = f"{[*first.shape]} and {[*features[name].shape]}"
                raise ValueError(f"features {shapes} are not of the same examples")
        # float64, which MPS has not.
        dtype = torch.float32 if first.device.type == "mps" else torch.float64
        flat = {name: features[name].detach().to(dtype).flatten(0, -2) for name in self._names}
        self._origins = self._origins or {name: each.mean(0) for name, each in flat.items()}
        flat = {name: pad(each - self._origins[name], (0, 1), value=1.0) for name, each in flat.items()}
        for x, y in self._pairs:
            self._products[x, y] = self._products.get((x, y), 0) + flat[x].mT @ flat[y]

    def value(self, x: Hashable, y: Hashable) -> float:
        """The alignment of everything added; NaN before anything was, or if one is constant."""
        if not self._products or self._is_constant(x) or self._is_constant(y):
            return math.nan
        pairs = ((x, y), (x, x), (y, y))
        xy, xx, yy = (torch.linalg.matrix_norm(self._scatter(*pair)).item() for pair in pairs)
        return min(xy**2 / (xx * yy), 1.0)

    def _scatter(self, x: Hashable, y: Hashable) -> Tensor:
        """[D, D']: Σ (x − x̄)(y − ȳ)ᵀ."""
        product = self._products[x, y]
        return product[:-1, :-1] - torch.outer(product[:-1, -1], product[-1, :-1]) / product[-1, -1]

    def _is_constant(self, name: Hashable) -> bool:
        """Whether nothing but the rounding of the mean is left of these features."""
        sums, count = self._products[name, name][-1, :-1], self._products[name, name][-1, -1]
        mean = self._origins[name] + sums / count
        size = (count * mean.square().sum()).item()
        return self._scatter(name, name).trace().item() <= (100 * torch.finfo(mean.dtype).eps) ** 2 * size


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
