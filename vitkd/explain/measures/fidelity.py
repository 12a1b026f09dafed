"""The fidelity table: how alike student and teacher attend, map by map, beside two baselines.

All maps are attention weights after the softmax. Averages leave out where a metric is undefined.

Shapes: B images, H heads, T tokens (prefix + h·w), P pairs; of windows W windows of N tokens each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.windows import Windows
from vitkd.explain.measures.distances import (
    COMPARISONS,
    Reading,
    compare_readings,
    mean_distance,
    read,
    read_within,
    windowed_distance,
)
from vitkd.models.output import at_least_float32

DRAWS = 12
"""The most sets of other heads that a map is compared with."""

Weights = Mapping[int, Tensor] | Sequence[Tensor]
"""block → its attention weights [B, H, T, T], within windows [B, H, W·N, N]"""

Maps = Callable[..., Reading]
"""heads and perhaps their weights → the reading of their mean map, or that of their weighted scores"""

Metrics = dict[tuple[str, str], Tensor]
"""(field of `FidelityRow`, name) → one value an image [B]"""


class MapPair(NamedTuple):
    """A student map and the teacher maps whose mean it is compared with."""

    student_block: int
    student_head: int
    teacher_block: int
    teacher_heads: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """of the teacher heads, if instead of their mean it is the softmax of their weighted scores"""


@dataclass(frozen=True)
class FidelityRow:
    """The metrics of one pair of maps, averaged over images; None where no image defines one."""

    student_block: int
    student_head: int
    teacher_block: int
    teacher_heads: tuple[int, ...]
    weights: tuple[float, ...]
    """of the teacher heads' scores; none of a mean"""
    images: int
    metrics: dict[str, float | None]
    """`COMPARISONS` with the teacher, and the student's own `entropy` [nats] and `mean_distance` [pixels]"""
    teacher: dict[str, float | None]
    """the teacher's `entropy` and `mean_distance`"""
    alone: dict[str, float | None] | None
    """as `metrics`, of a student that learned without the teacher; None if none was given"""
    permuted: dict[str, float | None] | None
    """`COMPARISONS` with other heads of the same teacher block; None if it has no others"""


class FidelitySums:
    """The fidelity table over batches of images: only sums are kept.

    Each pair's metrics stand beside two baselines. `alone` is a student that learned without the teacher, if
    one is given. `permuted` is how alike the map is to any other head of the teacher's block: the
    expectation over permutations of the teacher's heads that give the pair others, so the mean over all other
    sets of as many heads, or over `DRAWS` of them where there are more. Weighted heads have as others those
    with the weights that the student block's other maps are compared with.

    Args:
        pairs: (student block, student head, teacher block, teacher heads) each; where there are several
            teacher heads, the mean of their maps is compared with, or by a fifth value, their weights, the
            softmax of their weighted scores.
        grid: (h, w) patches, of student and teacher alike.
        patch_size: pixels of a patch's side, or (height, width).
        prefix, readers: as for `compare`.
        windows: within which all of the maps are, if they are; then every token is a patch, and all are read.

    Raises:
        ConfigError: no pair, or a pair without teacher heads or with one twice.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int, int, Sequence[int]] | MapPair],
        *,
        grid: tuple[int, int],
        patch_size: float | tuple[float, float],
        prefix: int = 1,
        readers: Sequence[int] = (0,),
        windows: Windows | None = None,
    ) -> None:
        self.pairs = [MapPair(*pair[:3], tuple(pair[3]), *pair[4:]) for pair in pairs]
        if not self.pairs:
            raise ConfigError("no student map is paired with a teacher map: name at least one pair")
        for heads in (pair.teacher_heads for pair in self.pairs):
            if not heads or len({*heads}) < len(heads):
                raise ConfigError(f"teacher heads {[*heads]}: name at least one, each only once")
        self._grid, self._patch_size, self._prefix, self._readers = grid, patch_size, prefix, readers
        self._windows = windows
        self._images = 0
        self._keys: list[tuple[str, str]] = []
        self._sums, self._defined = torch.zeros(2, 1, 1, dtype=torch.float64)
        """[K, P]: of each key's defined values, and how many these are"""

    @torch.no_grad()
    def add(self, student: Weights, teacher: Weights, alone: Weights | None = None) -> dict[str, Tensor]:
        """Add a batch, and return each image's metrics: name → [B, P] float64 on the CPU.

        Args:
            student, teacher, alone: block → weights [B, H, T, T], for the blocks that pairs name at least;
                `alone` is the student that learned without the teacher, in all batches or in none.

        Raises:
            ConfigError: a pair names a block or head that does not exist.
            ValueError: student and teacher have different tokens, or not those of the grid.
        """
        metrics: list[Metrics] = []
        # Neighbouring pairs of the same blocks share readings of their maps.
        for (student_block, teacher_block), pairs in groupby(self.pairs, itemgetter(0, 2)):
            student_maps = self._maps("student", student, student_block)
            teacher_maps = self._maps("teacher", teacher, teacher_block)
            without = None if alone is None else self._maps("student alone", alone, student_block)
            heads = teacher[teacher_block].shape[1]
            metrics += [self._metrics(pair, heads, student_maps, teacher_maps, without) for pair in pairs]
        return self._accumulate(metrics)

    def table(self) -> list[FidelityRow]:
        """One row a pair, averaged over the images added; one where a metric is undefined is left out."""
        assert self._images, "add a batch first"
        return [self._row(index, pair) for index, pair in enumerate(self.pairs)]

    def _maps(self, whose: str, weights: Weights, block: int) -> Maps:
        """The reading of a map of one block by its heads and weights, read when first asked for."""
        if not isinstance(weights, Mapping):
            _check_exists("block", block, len(weights), f"the {whose}")
        elif block not in weights:
            raise ConfigError(f"block {block}: of the {whose} there are {', '.join(map(str, weights))}")
        maps = weights[block]

        @cache
        def reading(heads: tuple[int, ...], weights: tuple[float, ...] = ()) -> Reading:
            for head in heads:
                _check_exists("head", head, maps.shape[1], f"block {block} of the {whose}")
            members = at_least_float32(maps[:, list(heads)])
            return self._read(weighted(members, weights) if weights else members.mean(1))

        return reading

    def _read(self, weights: Tensor) -> Reading:
        if self._windows is not None:
            return read_within(weights, self._windows)
        return read(weights, self._prefix, readers=self._readers)

    def _metrics(
        self, pair: MapPair, teacher_heads: int, student_maps: Maps, teacher_maps: Maps, alone: Maps | None
    ) -> Metrics:
        """One pair's metrics [B]."""
        student, teacher = student_maps((pair.student_head,)), teacher_maps(*pair[3:])
        if student.weights.shape != teacher.weights.shape:
            tokens = (reading.weights.shape[-1] for reading in (student, teacher))
            raise ValueError("student and teacher have {} and {} tokens: resize one's maps".format(*tokens))
        others = [teacher_maps(*other) for other in self._others(pair, teacher_heads)]
        parts = {
            "metrics": compare_readings(student, teacher) | self._spread(student),
            "teacher": self._spread(teacher),
            "permuted": _mean_comparisons(student, others),
        }
        if alone is not None:
            without = alone((pair.student_head,))
            parts["alone"] = compare_readings(without, teacher) | self._spread(without)
        return {(part, name): values for part, each in parts.items() for name, values in each.items()}

    def _others(self, pair: MapPair, teacher_heads: int) -> list[tuple[tuple[Any, ...], ...]]:
        """The heads, and weights if any, of other maps of the teacher's block, which has so many heads."""
        if not pair.weights:
            return [(heads,) for heads in other_heads(pair.teacher_heads, teacher_heads, DRAWS, seed=0)]
        blocks = itemgetter(0, 2)
        of_block = [other for other in self.pairs if blocks(other) == blocks(pair)]
        return [other[3:] for other in of_block if other.weights != pair.weights]

    def _spread(self, of: Reading) -> dict[str, Tensor]:
        """How far apart the places are that a map attends to, [B] each."""
        if self._windows is not None:
            distance = windowed_distance(of.weights, self._windows, self._patch_size)
        else:
            distance = mean_distance(of.weights, self._grid, self._patch_size, self._prefix)
        return {"entropy": (of.weights * -of.log).sum(-1).mean(-1), "mean_distance": distance}

    def _accumulate(self, of_pairs: Sequence[Metrics]) -> dict[str, Tensor]:
        """Add the metrics [B] of all pairs to the sums; return those of the students, name → [B, P]."""
        keys = list(of_pairs[0])
        assert self._keys in ([], keys), "give the student alone in all batches or in none"
        # One transfer from the device, where each costs as much as all; MPS has no float64.
        stacked = torch.stack([torch.stack([metrics[key] for metrics in of_pairs], 1) for key in keys])
        stacked = stacked.cpu().double()
        self._keys = keys
        self._sums = self._sums + stacked.nansum(1)
        self._defined = self._defined + (~stacked.isnan()).sum(1)
        self._images += stacked.shape[1]
        return {name: values for (part, name), values in zip(keys, stacked, strict=True) if part == "metrics"}

    def _row(self, index: int, pair: MapPair) -> FidelityRow:
        parts: dict[str, dict[str, float | None]] = {}
        means = (self._sums / self._defined)[:, index].tolist()
        for (part, name), mean in zip(self._keys, means, strict=True):
            parts.setdefault(part, {})[name] = None if math.isnan(mean) else mean
        permuted = None if all(mean is None for mean in parts["permuted"].values()) else parts["permuted"]
        return FidelityRow(
            *pair, self._images, parts["metrics"], parts["teacher"], parts.get("alone"), permuted
        )


def weighted(maps: Tensor, weights: Sequence[float]) -> Tensor:
    """softmax(Σ_h weight_h · scores_h) [B, T, T] of attention weights [B, H, T, T].

    Their logarithms are the scores less a constant of each row, which the softmax ignores. A weight of 0 in
    all heads stays 0: their mask is the same.
    """
    smallest = torch.finfo(maps.dtype).tiny
    scores = torch.einsum("h,bhqk->bqk", maps.new_tensor(weights), maps.clamp_min(smallest).log())
    return scores.masked_fill((maps <= smallest).all(1), -math.inf).softmax(-1)


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


def _mean_comparisons(student: Reading, others: Sequence[Reading]) -> dict[str, Tensor]:
    """`COMPARISONS` [B] of one map, averaged over several it is compared with; NaN if there are none."""
    if not others:
        return dict.fromkeys(COMPARISONS, torch.full_like(student.log[..., 0, 0], math.nan))
    each = [compare_readings(student, other) for other in others]
    return {name: torch.stack([metrics[name] for metrics in each]).nanmean(0) for name in COMPARISONS}


def _check_exists(what: str, number: int, count: int, owner: str) -> None:
    if not 0 <= number < count:
        raise ConfigError(f"{what} {number}: {owner} has {count}, so choose 0 to {count - 1}")
