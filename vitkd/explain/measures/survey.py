"""One pass over a test split: what every model answers, and how alike student and teacher look at an image.

Shapes: B images of a batch, N of the split, L blocks, H heads, P pairs of maps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkd.explain.maps.recording import Recording, evaluating, has_maps, logits_of, record
from vitkd.explain.measures.cka import CKASums
from vitkd.explain.measures.fidelity import FidelityRow, FidelitySums, MapPair, locality
from vitkd.models.tokens import resized_weights, token_interpolation, without_tokens

AT_A_TIME = 64
"""Images whose tokens are in float64 at once."""


class Comparison(NamedTuple):
    """Whose maps are held against whose."""

    teacher: str
    """a model's name"""
    pairs: Sequence[MapPair]
    learnt: Sequence[bool]
    """[P] whether that pair was distilled"""
    patch_size: float
    """pixels of a patch's side"""
    alone: str | None = None
    """the name of a student that learned without the teacher, the other baseline"""


class TokenAlignment(NamedTuple):
    """The linear CKA of a student block's tokens with a teacher block's; NaN if either's are constant."""

    value: float
    alone: float | None
    """of the student that learned without the teacher; None if none was given"""
    other_images: float
    """with the teacher's tokens of another image: what their places have in common; NaN if there is none"""


@dataclass(frozen=True, eq=False)
class Alikeness:
    """How alike a student attends to its teacher."""

    rows: Sequence[FidelityRow]
    """one a pair"""
    learnt: Sequence[bool]
    """[P] whether that pair was distilled"""
    divergence: Tensor
    """[N] Jensen–Shannon divergence in nats, the mean over distilled pairs, or over all if none was"""
    cka: Mapping[tuple[int, int], TokenAlignment]
    """(student block, teacher block) → how their tokens align"""


@dataclass(frozen=True, eq=False)
class Survey:
    """What was seen on the whole split."""

    labels: Tensor
    """[N]"""
    numbers: Tensor
    """[N] each image's position in its split"""
    predicted: Mapping[str, Tensor]
    """model → [N]"""
    confidence: Mapping[str, Tensor]
    """model → [N] probability of the class predicted"""
    reach: Mapping[str, Tensor]
    """model → [L, H] mean attention distance over that of uniform attention, of those with maps"""
    alikeness: Mapping[str, Alikeness]
    """student → beside its teacher, where the two can be compared"""


@torch.no_grad()
def survey(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    comparisons: Mapping[str, Comparison],
) -> Survey:
    """Ask all `models` about every batch (images [B, C, H, W], labels [B], positions [B]).

    The batches' order is to be random: the baseline of CKA takes the image before for any other one.
    One without attention maps is asked for its answers alone.

    Raises ConfigError if a model's maps cannot be had.
    """
    labels, numbers, found = [], [], {name: _Answers() for name in models}
    sums: dict[str, _Sums] = {}
    for images, label, number in batches:
        seen = {name: record(model, images) for name, model in models.items() if has_maps(model)}
        labels.append(label.cpu())
        numbers.append(number.cpu())
        for name, model in models.items():
            found[name].add(seen[name].logits if name in seen else _logits(model, images))
        for name, recording in seen.items():
            found[name].look(recording)
        for student, comparison in comparisons.items():
            those = _comparable(student, comparison, seen)
            if student not in sums:
                sums[student] = _Sums(comparison, those[0])
            sums[student].add(*those)
    return Survey(
        torch.cat(labels),
        torch.cat(numbers),
        {name: torch.cat(answers.predicted) for name, answers in found.items()},
        {name: torch.cat(answers.confidence) for name, answers in found.items()},
        {name: torch.cat(answers.reach).nanmean(0) for name, answers in found.items() if answers.reach},
        {student: each.alikeness() for student, each in sums.items()},
    )


class _Answers:
    """One model's."""

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.confidence: list[Tensor] = []
        self.reach: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        confidence, predicted = logits.float().softmax(-1).max(-1)
        self.predicted.append(predicted.cpu())
        self.confidence.append(confidence.cpu())

    def look(self, recording: Recording) -> None:
        self.reach.append(locality(recording.weights, recording.grid, recording.prefix).cpu())


class _Sums:
    """One student's beside its teacher's."""

    def __init__(self, comparison: Comparison, recording: Recording) -> None:
        self.comparison = comparison
        self.fidelity = FidelitySums(
            comparison.pairs,
            grid=recording.grid,
            patch_size=comparison.patch_size,
            prefix=recording.prefix,
            readers=recording.readers,
        )
        self.cka = _TokenSums(comparison)
        self.divergence: list[Tensor] = []

    def add(self, student: Recording, teacher: Recording, alone: Recording | None = None) -> None:
        without = None if alone is None else _by_block(alone)
        figures = self.fidelity.add(_by_block(student), _by_block(teacher), without)
        counted = torch.tensor(self.comparison.learnt)
        counted = counted if counted.any() else ~counted
        self.divergence.append(figures["js"][:, counted].mean(1))
        self.cka.add(student, teacher, alone)

    def alikeness(self) -> Alikeness:
        return Alikeness(
            self.fidelity.table(), self.comparison.learnt, torch.cat(self.divergence), self.cka.values()
        )


class _TokenSums:
    """The alignment of one student's tokens with its teacher's, over batches."""

    def __init__(self, comparison: Comparison) -> None:
        self.blocks = [*dict.fromkeys((pair.student_block, pair.teacher_block) for pair in comparison.pairs)]
        self.has_alone = comparison.alone is not None
        self.images = 0
        self.before: dict[int, Tensor] = {}
        """teacher block → its tokens [1, T, D] of the last image so far"""
        ours = ["student", *(["alone"] if self.has_alone else [])]
        pairs = [((who, s), ("teacher", t)) for s, t in self.blocks for who in ours]
        self.sums = CKASums([*pairs, *((("student", s), ("another's", t)) for s, t in self.blocks)])

    def add(self, student: Recording, teacher: Recording, alone: Recording | None) -> None:
        self.images += len(student.tokens[0])
        recordings = {"student": student, "teacher": teacher} | ({} if alone is None else {"alone": alone})
        features = {
            (who, block): tokens
            for who, recording in recordings.items()
            for block, tokens in enumerate(recording.tokens)
        }
        for block in {block for _, block in self.blocks}:
            theirs = teacher.tokens[block]
            features["another's", block] = torch.cat([self.before.get(block, theirs[-1:]), theirs[:-1]])
            self.before[block] = theirs[-1:]
        for start in range(0, len(student.tokens[0]), AT_A_TIME):
            self.sums.add({name: each[start : start + AT_A_TIME] for name, each in features.items()})

    def values(self) -> dict[tuple[int, int], TokenAlignment]:
        value = self.sums.value
        return {
            (ours, theirs): TokenAlignment(
                value(("student", ours), ("teacher", theirs)),
                value(("alone", ours), ("teacher", theirs)) if self.has_alone else None,
                value(("student", ours), ("another's", theirs)) if self.images > 1 else math.nan,
            )
            for ours, theirs in self.blocks
        }


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return logits_of(model, images)


def _comparable(student: str, comparison: Comparison, seen: Mapping[str, Recording]) -> list[Recording]:
    """The student's, its teacher's and, if it is compared with, the student's that learned without."""
    names = [student, comparison.teacher, comparison.alone]
    return comparable(*(seen[name] for name in names if name is not None))


def comparable(*recordings: Recording) -> list[Recording]:
    """Recordings of the same images with weights and tokens that all of the models have.

    A distillation token that another lacks is left out, and no longer read by the classifier; so is what a
    token gives to itself, where another's gives itself nothing by design. What is left of a row is scaled to
    sum 1 again. Patches on another grid than the first's are resized to that, as a student's targets are, and
    of the tokens before them the class token alone is kept then.
    """
    grid = recordings[0].grid
    has_one_grid = all(recording.grid == grid for recording in recordings)
    prefix = min(recording.prefix for recording in recordings) if has_one_grid else 1
    found = [_on_grid(_of_first_tokens(recording, prefix), grid) for recording in recordings]
    if len({recording.sees_itself for recording in found}) > 1:
        return [_without_itself(recording) for recording in found]
    return found


def _of_first_tokens(recording: Recording, kept: int) -> Recording:
    """A recording of the first `kept` tokens and the patches."""
    prefix = recording.prefix
    if kept == prefix:
        return recording
    weights = (
        without_tokens(without_tokens(w, -1, kept, prefix), -2, kept, prefix) for w in recording.weights
    )
    return recording._replace(
        weights=tuple(map(_scaled, weights)),
        tokens=tuple(without_tokens(each, -2, kept, prefix) for each in recording.tokens),
        prefix=kept,
        readers=_still_there(recording.readers, prefix, kept),
    )


def _on_grid(recording: Recording, grid: tuple[int, int]) -> Recording:
    """A recording of the class token and a square of patches as if their grid had been `grid`."""
    if recording.grid == grid:
        return recording
    matrix = token_interpolation(recording.grid, grid).to(recording.weights[0])
    return recording._replace(
        weights=tuple(resized_weights(each, matrix) for each in recording.weights),
        tokens=tuple(matrix @ each for each in recording.tokens),
        grid=grid,
    )


def _without_itself(recording: Recording) -> Recording:
    """A recording without what tokens give to themselves."""
    own = torch.eye(recording.weights[0].shape[-1], dtype=torch.bool, device=recording.weights[0].device)
    return recording._replace(weights=tuple(_scaled(w.masked_fill(own, 0)) for w in recording.weights))


def _scaled(weights: Tensor) -> Tensor:
    """Rows that sum to 1 again; one that has nothing left stays empty."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp_min(torch.finfo(total.dtype).tiny)


def _still_there(readers: Sequence[int], prefix: int, kept: int) -> list[int]:
    """Where those of `readers` stand that are left, without the tokens from `kept` to `prefix`."""
    return [r if r < kept else r - prefix + kept for r in readers if r < kept or r >= prefix]


def _by_block(recording: Recording) -> dict[int, Tensor]:
    return dict(enumerate(recording.weights))
