"""One pass over a test split: what every model predicts, and how alike student and teacher attend.

Shapes: B images of a batch, N of the split, L blocks, H heads, P pairs of maps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkd.explain.maps.attention import scaled
from vitkd.explain.maps.recording import Recording, has_maps, logits_of, record
from vitkd.explain.measures.distances import CKASums, locality, windowed_locality
from vitkd.explain.measures.fidelity import FidelityRow, FidelitySums, MapPair
from vitkd.methods.maps.alignment import resized_weights, token_interpolation, without_tokens

CHUNK = 64
"""Images whose tokens are in float64 at once."""


class Comparison(NamedTuple):
    """Which maps of a student are compared with which of its teacher."""

    teacher: str
    """a model's name"""
    pairs: Sequence[MapPair]
    distilled: Sequence[bool]
    """[P] whether that pair was distilled"""
    patch_size: float
    """pixels of a patch's side in the student's first block"""
    alone: str | None = None
    """the name of a student that learned without the teacher, the other baseline"""


class TokenAlignment(NamedTuple):
    """The linear CKA of a student block's tokens with a teacher block's; NaN if either's are constant."""

    value: float
    alone: float | None
    """of the student that learned without the teacher; None if none was given"""
    other_images: float
    """with the teacher's tokens of another image: what is common to all images; NaN if there is no other"""


@dataclass(frozen=True, eq=False)
class FidelityResult:
    """How alike a student and its teacher attend."""

    rows: Sequence[FidelityRow]
    """one a pair"""
    distilled: Sequence[bool]
    """[P] whether that pair was distilled"""
    divergence: Tensor
    """[N] Jensen–Shannon divergence in nats, the mean over distilled pairs, or over all if none was"""
    cka: Mapping[tuple[int, int], TokenAlignment]
    """(student block, teacher block) → how their tokens align"""


@dataclass(frozen=True, eq=False)
class Survey:
    """What was measured on the whole split."""

    labels: Tensor
    """[N]"""
    numbers: Tensor
    """[N] each image's position in its split"""
    predicted: Mapping[str, Tensor]
    """model → [N]"""
    reach: Mapping[str, Tensor]
    """model → [L, H] mean attention distance over that of uniform attention, of those with maps"""
    fidelity: Mapping[str, FidelityResult]
    """student → its fidelity to its teacher, where the two can be compared"""


@torch.no_grad()
def survey(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    comparisons: Mapping[str, Comparison],
) -> Survey:
    """Run all `models` on every batch (images [B, C, H, W], labels [B], positions [B]).

    Images must come in random order: the baseline of CKA pairs each with the one before it. Of a model
    without attention maps only the predictions are recorded.

    Raises ConfigError if a model's maps cannot be recorded.
    """
    labels, numbers = [], []
    predicted: dict[str, list[Tensor]] = {name: [] for name in models}
    reach: dict[str, list[Tensor]] = {name: [] for name, model in models.items() if has_maps(model)}
    sums: dict[str, _FidelitySums] = {}
    for images, label, number in batches:
        recordings = {name: record(models[name], images) for name in reach}
        labels.append(label.cpu())
        numbers.append(number.cpu())
        for name, model in models.items():
            logits = recordings[name].logits if name in recordings else logits_of(model, images)
            predicted[name].append(logits.argmax(-1).cpu())
        for name, recording in recordings.items():
            reach[name].append(reach_of(recording).cpu())
        for student, comparison in comparisons.items():
            names = [student, comparison.teacher, *([comparison.alone] if comparison.alone else [])]
            if student not in sums:
                sums[student] = _FidelitySums(comparison)
            sums[student].add(*(recordings[name] for name in names))
    return Survey(
        torch.cat(labels),
        torch.cat(numbers),
        {name: torch.cat(each) for name, each in predicted.items()},
        {name: torch.cat(each).nanmean(0) for name, each in reach.items()},
        {student: each.result() for student, each in sums.items()},
    )


def reach_of(recording: Recording) -> Tensor:
    """Mean attention distances [B, L, H], relative to that of uniform attention."""
    if recording.windows:
        return windowed_locality(recording.weights, recording.windows)
    return locality(recording.weights, recording.grid, recording.prefix)


class _FidelitySums:
    """The fidelity of one student to its teacher over batches, by each pair of blocks."""

    def __init__(self, comparison: Comparison) -> None:
        self.distilled = comparison.distilled
        self.blocks = [
            _BlockSums(comparison, blocks, [*pairs])
            for blocks, pairs in groupby(comparison.pairs, itemgetter(0, 2))
        ]
        self.divergence: list[Tensor] = []

    def add(self, *recordings: Recording) -> None:
        """Add a batch: the student, the teacher and, if it is compared, the student alone."""
        js = torch.cat([block.add(*recordings) for block in self.blocks], 1)
        counted = torch.tensor(self.distilled)
        self.divergence.append(js[:, counted if counted.any() else ~counted].mean(1))

    def result(self) -> FidelityResult:
        return FidelityResult(
            [row for block in self.blocks for row in block.table()],
            self.distilled,
            torch.cat(self.divergence),
            {block.blocks: block.alignment() for block in self.blocks},
        )


class _BlockSums:
    """How alike a student's block and a teacher's attend, and how alike their tokens are, over batches."""

    def __init__(self, comparison: Comparison, blocks: tuple[int, int], pairs: Sequence[MapPair]) -> None:
        self.comparison, self.blocks, self.pairs = comparison, blocks, pairs
        students = ("student", "alone") if comparison.alone else ("student",)
        self.tokens = CKASums([("student", "other images"), *((who, "teacher") for who in students)])
        self.maps: FidelitySums | None = None
        self.last: Tensor | None = None
        """the teacher's tokens [1, T, D] of the last image so far"""
        self.images = 0

    def add(self, *recordings: Recording) -> Tensor:
        """Add a batch of whole recordings, and return the divergence [B, P] of every map of this block."""
        student, teacher = self.blocks
        numbers = (student, teacher, student)
        blocks = [block_of(*each) for each in zip(recordings, numbers, strict=False)]
        compared = comparable(*blocks)
        if self.maps is None:
            self.maps = self._sums(compared[0], self.comparison.patch_size * recordings[0].grid[0])
        self._add_tokens(*(recording.tokens[0] for recording in compared))
        of_models = (
            {number: recording.weights[0]} for recording, number in zip(compared, numbers, strict=False)
        )
        return self.maps.add(*of_models)["js"]

    def table(self) -> list[FidelityRow]:
        """A row a pair of maps."""
        assert self.maps is not None, "add a batch first"
        return self.maps.table()

    def alignment(self) -> TokenAlignment:
        """How the tokens after both blocks align."""
        return TokenAlignment(
            self.tokens.value("student", "teacher"),
            self.tokens.value("alone", "teacher") if self.comparison.alone else None,
            self.tokens.value("student", "other images") if self.images > 1 else math.nan,
        )

    def _sums(self, compared: Recording, pixels: float) -> FidelitySums:
        return FidelitySums(
            self.pairs,
            grid=compared.grid,
            patch_size=pixels / compared.grid[0],
            prefix=compared.prefix,
            readers=compared.readers,
            windows=compared.windows[0] if compared.windows else None,
        )

    def _add_tokens(self, student: Tensor, teacher: Tensor, alone: Tensor | None = None) -> None:
        """Add a batch's tokens [B, T, D], each image's teacher also as that of the next."""
        others = torch.cat([teacher[-1:] if self.last is None else self.last, teacher[:-1]])
        self.last, self.images = teacher[-1:], self.images + len(teacher)
        features = {"student": student, "teacher": teacher, "other images": others}
        features |= {} if alone is None else {"alone": alone}
        for start in range(0, len(student), CHUNK):
            self.tokens.add({name: each[start : start + CHUNK] for name, each in features.items()})


def block_of(recording: Recording, block: int) -> Recording:
    """One block of a recording, whose patches are then the block's tokens.

    A single window is all of them, as a ViT has it, so that it can be compared with one.
    """
    of_block = recording._replace(weights=(recording.weights[block],), tokens=(recording.tokens[block],))
    if not recording.windows:
        return of_block
    place = recording.windows[block]
    windows = (place,) if len(place.tokens) > 1 else ()
    return of_block._replace(grid=place.grid, readers=range(place.tokens.numel()), windows=windows)


def comparable(*recordings: Recording) -> list[Recording]:
    """Recordings of the same images, reduced to the weights and tokens that all of the models have.

    A distillation token that another lacks is left out, also as a reader; so is what a token gives to itself,
    where another model's tokens give themselves nothing by design. What is left of a row is scaled to sum 1.
    Patches on another grid than the first's are resized to that, as a student's targets are, and of the
    tokens before them only the class token is kept then. Windows have to be the same in all recordings.
    """
    grid = recordings[0].grid
    has_one_grid = all(recording.grid == grid for recording in recordings)
    prefix = min(recording.prefix for recording in recordings)
    prefix = prefix if has_one_grid else min(prefix, 1)
    reduced = [_on_grid(_with_prefix(recording, prefix), grid) for recording in recordings]
    if len({recording.sees_itself for recording in reduced}) == 1:
        return reduced
    own = torch.eye(reduced[0].weights[0].shape[-1], dtype=torch.bool, device=reduced[0].logits.device)
    return [
        recording._replace(weights=tuple(scaled(each.masked_fill(own, 0)) for each in recording.weights))
        for recording in reduced
    ]


def _with_prefix(recording: Recording, kept: int) -> Recording:
    """A recording of the first `kept` tokens and the patches."""
    prefix = recording.prefix
    if kept == prefix:
        return recording
    moved = [r if r < kept else r - prefix + kept for r in recording.readers if r < kept or r >= prefix]
    # Without a token that classifies, what all patches give is read.
    moved = moved or [*range(kept, kept + math.prod(recording.grid))]
    weights = (without_tokens(each, kept, prefix, (-1, -2)) for each in recording.weights)
    return recording._replace(
        weights=tuple(map(scaled, weights)),
        tokens=tuple(without_tokens(each, kept, prefix) for each in recording.tokens),
        prefix=kept,
        readers=moved,
    )


def _on_grid(recording: Recording, grid: tuple[int, int]) -> Recording:
    """A recording of the class token, if there is one, and a square of patches, resized to `grid`."""
    if recording.grid == grid:
        return recording
    matrix = token_interpolation(recording.grid, grid, recording.prefix).to(recording.weights[0])
    return recording._replace(
        weights=tuple(resized_weights(each, matrix, recording.prefix) for each in recording.weights),
        tokens=tuple(matrix @ each for each in recording.tokens),
        grid=grid,
    )
