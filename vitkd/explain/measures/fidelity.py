"""How faithfully a student attends as its teacher does, in figures per image and map.

All maps are attention weights after the softmax. Where a figure is undefined (the rank correlation of a row
of equal weights, for one) it is NaN, and averages leave it out.

Shapes: B images, H heads, M maps (any number of axes), T tokens (prefix + h·w), N = h·w patches, P pairs,
L blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import rows_read
from vitkd.models.output import at_least_float32

COMPARISONS = ("kl", "js", "spearman", "top_k_iou", "cls_overlap")
"""of two maps; `kl` and `js` fall with fidelity, the others rise with it"""

CHUNK = 2**18
"""Numbers in the maps that `fidelity_table` compares at once, so that they stay in the CPU's cache."""

Weights = Mapping[int, Tensor] | Sequence[Tensor]
"""block → its attention weights [B, H, T, T]"""

Maps = Callable[[tuple[int, ...]], "Reading"]
"""heads → the reading of their mean map"""

Figures = dict[tuple[str, str], Tensor]
"""(field of `FidelityRow`, name) → one figure an image [B]"""


class MapPair(NamedTuple):
    """A student map and the teacher maps whose mean it is held against."""

    student_block: int
    student_head: int
    teacher_block: int
    teacher_heads: tuple[int, ...]


@dataclass(frozen=True)
class FidelityRow:
    """The figures of one pair of maps, averaged over images; None where no image defines one."""

    student_block: int
    student_head: int
    teacher_block: int
    teacher_heads: tuple[int, ...]
    images: int
    figures: dict[str, float | None]
    """`COMPARISONS` with the teacher, and the student's own `entropy` [nats] and `mean_distance` [pixels]"""
    teacher: dict[str, float | None]
    """the teacher's `entropy` and `mean_distance`"""
    alone: dict[str, float | None] | None
    """as `figures`, of a student that learned without the teacher; None if none was given"""
    permuted: dict[str, float | None] | None
    """`COMPARISONS` with other heads of the same teacher block; None if it has no others"""


class Reading(NamedTuple):
    """What comparisons read of maps, so that a map compared with many is read once."""

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
    ours: Tensor, theirs: Tensor, *, prefix: int = 1, k: int | None = None, readers: Sequence[int] = (0,)
) -> dict[str, Tensor]:
    """Measures [B, ...M] of how alike two maps are, for each image.

    The class row is that of the class token, or the mean of the rows that the classifier reads.

    - `kl`: KL(theirs ‖ ours) in nats, mean over query rows. A weight of ours that underflowed to 0 counts as
      the smallest normal number, so that the figure stays finite.
    - `js`: the Jensen-Shannon divergence in nats, mean over query rows, at most log 2.
    - `spearman`: rank correlation of the class rows over patches, ties sharing their mean rank; NaN if all
      weights of a row are equal.
    - `top_k_iou`: intersection over union of the k patches with the highest weight in the class rows.
    - `cls_overlap`: Σ min(p, q) of the class rows, renormalised over patches: 1 if equal, 0 if disjoint; NaN
      if a row gives the patches nothing.

    Args:
        ours, theirs: [B, ...M, T, T], the student's and the teacher's, rows summing to 1.
        prefix: tokens before the patches.
        k: a quarter of the patches, at least one, if None.
        readers: the tokens that the classifier reads, as `Recording.readers` has them.

    Raises:
        ConfigError: k is not 1 to N.
        ValueError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"maps of shapes {[*ours.shape]} and {[*theirs.shape]} cannot be compared")
    return measures(read(ours, prefix, k, readers), read(theirs, prefix, k, readers))


def read(weights: Tensor, prefix: int = 1, k: int | None = None, readers: Sequence[int] = (0,)) -> Reading:
    """A `Reading` of attention weights [B, ...M, T, T]; the arguments are those of `compare`."""
    p = at_least_float32(weights)
    row = rows_read(p, readers)[..., prefix:].contiguous()
    descending, order = row.sort(stable=True, dim=-1, descending=True)
    top = torch.zeros_like(row, dtype=torch.bool)
    top.scatter_(-1, order[..., : _top_count(k, row.shape[-1])], True)
    ranks = _unit_ranks(row, descending.flip(-1))
    return Reading(p, _log(p), row / row.sum(-1, keepdim=True), ranks, top)


def measures(ours: Reading, theirs: Reading) -> dict[str, Tensor]:
    """`compare` for maps that were read before."""
    q, p = ours.weights, theirs.weights
    log_mean = _log((p + q) / 2)
    js = (p * (theirs.log - log_mean) + q * (ours.log - log_mean)).sum(-1) / 2
    shared, either = (ours.top & theirs.top).sum(-1), (ours.top | theirs.top).sum(-1)
    # Rounding leaves some figures a hair outside their bounds.
    return {
        "kl": (p * (theirs.log - ours.log)).sum(-1).mean(-1).clamp_min(0),
        "js": js.mean(-1).clamp(0, math.log(2)),
        "spearman": (ours.ranks * theirs.ranks).sum(-1).clamp(-1, 1),
        "top_k_iou": shared.to(p.dtype) / either,
        "cls_overlap": torch.minimum(ours.row, theirs.row).sum(-1).clamp_max(1),
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


def locality(
    weights: Sequence[Tensor],
    grid: tuple[int, int],
    prefix: int = 1,
    patch_size: float | tuple[float, float] = 1.0,
) -> Tensor:
    """How far each block and head looks, relative to uniform attention: [B, L, H].

    0 is a token that attends to itself alone, 1 the mean distance of uniform attention. In ViTs trained on
    much data some heads of the low blocks are near 0; with little data these hardly learn local relations
    (Zhu et al. 2023). The mean over the last axis is the block's. NaN for a single patch.

    Args:
        weights: per block [B, H, T, T].
        grid: (h, w).
        prefix: tokens before the patches.
        patch_size: matters only if patches are not square.
    """
    distances = [mean_distance(each, grid, patch_size, prefix) for each in weights]
    return torch.stack(distances, 1) / uniform_distance(grid, patch_size)


def fidelity_table(
    student: Weights,
    teacher: Weights,
    pairs: Sequence[tuple[int, int, int, Sequence[int]]],
    *,
    alone: Weights | None = None,
    **settings: Any,
) -> list[FidelityRow]:
    """One row a pair, for maps that are all in memory; the settings are those of `FidelitySums`."""
    sums = FidelitySums(pairs, **settings)
    first = _block("student", student, sums.pairs[0].student_block)
    step = max(CHUNK // first.shape[-1] ** 2, 1)
    for start in range(0, len(first), step):
        chunk = slice(start, start + step)
        without = None if alone is None else _images(alone, chunk)
        sums.add(_images(student, chunk), _images(teacher, chunk), without)
    return sums.table()


class FidelitySums:
    """The fidelity table over batches of images: only sums are kept.

    Each pair's figures stand beside two baselines. `alone` is a student that learned without the teacher, if
    one is given. `permuted` is what the map shares with any other head of the teacher's block: the
    expectation over permutations of the teacher's heads that give the pair others, so the mean over all other
    sets of as many heads, or over `draws` of them where there are more.

    Args:
        pairs: (student block, student head, teacher block, teacher heads) each; where there are several
            teacher heads, the mean of their maps is compared with.
        grid: (h, w) patches, of student and teacher alike.
        patch_size: pixels of a patch's side, or (height, width).
        prefix, k, readers: as for `compare`.
        draws: the most sets of other heads that a map is compared with.
        seed: of their choice.

    Raises:
        ConfigError: no pair, or a pair without teacher heads or with one twice.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int, int, Sequence[int]]],
        *,
        grid: tuple[int, int],
        patch_size: float | tuple[float, float],
        prefix: int = 1,
        k: int | None = None,
        readers: Sequence[int] = (0,),
        draws: int = 12,
        seed: int = 0,
    ) -> None:
        assert draws > 0
        self.pairs = [MapPair(*pair[:3], tuple(pair[3])) for pair in pairs]
        _check_pairs(self.pairs)
        self._grid, self._patch_size, self._prefix = grid, patch_size, prefix
        self._k, self._readers = k, readers
        self._draws, self._seed = draws, seed
        self._images = 0
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._defined: dict[tuple[str, str], np.ndarray] = {}

    @torch.no_grad()
    def add(self, student: Weights, teacher: Weights, alone: Weights | None = None) -> dict[str, Tensor]:
        """Add a batch, and return each image's figures: name → [B, P] float64 on the CPU.

        Args:
            student, teacher, alone: block → weights [B, H, T, T], for the blocks that pairs name at least;
                `alone` is the student that learned without the teacher, in all batches or in none.

        Raises:
            ConfigError: a pair names a block or head that does not exist.
            ValueError: student and teacher have different tokens, or not those of the grid.
        """
        figures: dict[int, Figures] = {}
        for (student_block, teacher_block), indices in self._by_blocks().items():
            ours = self._maps("student", student, student_block)
            theirs = self._maps("teacher", teacher, teacher_block)
            without = None if alone is None else self._maps("student alone", alone, student_block)
            heads = teacher[teacher_block].shape[1]
            for index in indices:
                figures[index] = self._figures(self.pairs[index], heads, ours, theirs, without)
        return self._accumulate([figures[index] for index in range(len(self.pairs))])

    def table(self) -> list[FidelityRow]:
        """One row a pair, averaged over the images added; one that leaves a figure undefined is left out."""
        assert self._images, "add a batch first"
        return [self._row(index, pair) for index, pair in enumerate(self.pairs)]

    def _by_blocks(self) -> dict[tuple[int, int], list[int]]:
        """The indices of the pairs of each student and teacher block, which share readings of their maps."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, pair in enumerate(self.pairs):
            groups.setdefault((pair.student_block, pair.teacher_block), []).append(index)
        return groups

    def _maps(self, whose: str, weights: Weights, block: int) -> Maps:
        """heads → the reading of their mean map in one block, read when first asked for."""
        maps = _block(whose, weights, block)

        @cache
        def reading(heads: tuple[int, ...]) -> Reading:
            for head in heads:
                _check_exists("head", head, maps.shape[1], f"block {block} of the {whose}")
            mean = at_least_float32(maps[:, list(heads)]).mean(1)
            return read(mean, self._prefix, self._k, self._readers)

        return reading

    def _figures(
        self, pair: MapPair, teacher_heads: int, ours: Maps, theirs: Maps, alone: Maps | None
    ) -> Figures:
        """One pair's figures [B]."""
        student, teacher = ours((pair.student_head,)), theirs(pair.teacher_heads)
        if student.weights.shape != teacher.weights.shape:
            tokens = (reading.weights.shape[-1] for reading in (student, teacher))
            raise ValueError("student and teacher have {} and {} tokens: resize one's maps".format(*tokens))
        others = other_heads(pair.teacher_heads, teacher_heads, self._draws, self._seed)
        parts = {
            "figures": measures(student, teacher) | self._spread(student),
            "teacher": self._spread(teacher),
            "permuted": _mean_measures(student, [theirs(heads) for heads in others]),
        }
        if alone is not None:
            without = alone((pair.student_head,))
            parts["alone"] = measures(without, teacher) | self._spread(without)
        return {(part, name): values for part, each in parts.items() for name, values in each.items()}

    def _spread(self, of: Reading) -> dict[str, Tensor]:
        """How far apart the places are that a map attends to, [B] each."""
        distance = mean_distance(of.weights, self._grid, self._patch_size, self._prefix)
        return {"entropy": (of.weights * -of.log).sum(-1).mean(-1), "mean_distance": distance}

    def _accumulate(self, of_pairs: Sequence[Figures]) -> dict[str, Tensor]:
        """Add the figures [B] of all pairs to the sums; return those of the students, name → [B, P]."""
        keys = list(of_pairs[0])
        assert not self._sums or keys == list(self._sums), "give the student alone in all batches or in none"
        # One transfer from the device, where each costs as much as all; float64 is not to be had on MPS.
        stacked = torch.stack([torch.stack([figures[key] for figures in of_pairs], 1) for key in keys])
        table = dict(zip(keys, stacked.cpu().double(), strict=True))
        for key, values in table.items():
            self._sums[key] = self._sums.get(key, 0) + values.nansum(0).numpy()
            self._defined[key] = self._defined.get(key, 0) + (~values.isnan()).sum(0).numpy()
        self._images += stacked.shape[1]
        return {name: values for (part, name), values in table.items() if part == "figures"}

    def _row(self, index: int, pair: MapPair) -> FidelityRow:
        parts: dict[str, dict[str, float | None]] = {}
        for part, name in self._sums:
            defined = self._defined[part, name][index]
            mean = float(self._sums[part, name][index] / defined) if defined else None
            parts.setdefault(part, {})[name] = mean
        permuted = None if all(mean is None for mean in parts["permuted"].values()) else parts["permuted"]
        return FidelityRow(
            *pair, self._images, parts["figures"], parts["teacher"], parts.get("alone"), permuted
        )


def other_heads(heads: Sequence[int], count: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Other sets of as many of `count` heads: all, or `draws` of them, seeded, where there are more.

    They have no head in common with `heads`, unless too few others are left for that.
    """
    size = len(heads)
    own = tuple(sorted(heads))
    rest = [head for head in range(count) if head not in own]
    pool = rest if len(rest) >= size else [*range(count)]
    if math.comb(len(pool), size) <= draws + (pool != rest):
        return [each for each in combinations(pool, size) if each != own]
    random = np.random.default_rng(seed)
    chosen: set[tuple[int, ...]] = set()
    while len(chosen) < draws:
        drawn = tuple(sorted(random.choice(pool, size, replace=False).tolist()))
        chosen |= {drawn} - {own}
    return sorted(chosen)


def _mean_measures(student: Reading, others: Sequence[Reading]) -> dict[str, Tensor]:
    """`COMPARISONS` [B] of one map, averaged over several it is compared with; NaN if there are none."""
    if not others:
        return dict.fromkeys(COMPARISONS, torch.full_like(student.log[..., 0, 0], math.nan))
    each = [measures(student, other) for other in others]
    return {name: torch.stack([figures[name] for figures in each]).nanmean(0) for name in COMPARISONS}


def _check_pairs(pairs: Sequence[MapPair]) -> None:
    if not pairs:
        raise ConfigError("no student map is paired with a teacher map: name at least one pair")
    for pair in pairs:
        if not pair.teacher_heads or len({*pair.teacher_heads}) < len(pair.teacher_heads):
            raise ConfigError(f"teacher heads {[*pair.teacher_heads]}: name at least one, each only once")


def _check_exists(what: str, number: int, count: int, owner: str) -> None:
    if not 0 <= number < count:
        raise ConfigError(f"{what} {number}: {owner} has {count}, so choose 0 to {count - 1}")


def _block(whose: str, weights: Weights, block: int) -> Tensor:
    """[B, H, T, T] of a block; ConfigError where it does not exist or was not recorded."""
    if isinstance(weights, Mapping):
        if block not in weights:
            raise ConfigError(f"block {block}: of the {whose} there are {', '.join(map(str, weights))}")
    else:
        _check_exists("block", block, len(weights), f"the {whose}")
    return weights[block]


def _images(weights: Weights, images: slice) -> Weights:
    """The weights of some images only."""
    if isinstance(weights, Mapping):
        return {block: each[images] for block, each in weights.items()}
    return [each[images] for each in weights]


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
