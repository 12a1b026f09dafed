"""The transfer loss: what student and teacher say of a batch → how far apart they are.

Attention: teacher scores + student scores → one value per student map, and their weighted sum.

Scores are given as tensors, or, beyond `STREAM_ABOVE` tokens, as their factors, which are multiplied out only
for a few images at a time (`streaming`).

Shapes: S stacked students (absent for one), B batch, H heads, P student maps of all pairs, N tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment, without_distillation_token
from vitkd.methods.maps.controls import CONTROLS
from vitkd.methods.maps.losses import MASKED, AttentionLoss
from vitkd.methods.maps.pairing import BlockPair
from vitkd.methods.maps.streaming import STREAM_ABOVE, images_at_a_time, of_images, streamed
from vitkd.models import ModelOutput
from vitkd.models.base import Answer
from vitkd.models.layers import Factors, Scores, at_least_float32, changed


class Transfer(nn.Module, ABC):
    """What a student learns from its teacher besides labels. It has no parameters."""

    pairs: tuple[BlockPair, ...] = ()
    """which student maps learn from which teacher maps, if any do"""
    needs_logits = False
    """Whether training asks the teacher for its logits, too."""
    streams = False
    """Whether the models had better record just their scores' factors."""

    @property
    def student_blocks(self) -> list[int]:
        """The blocks whose scores the student has to record."""
        return [pair.student_block for pair in self.pairs]

    @property
    def teacher_blocks(self) -> list[int]:
        """The blocks whose scores the teacher is asked for."""
        return sorted({pair.teacher_block for pair in self.pairs})

    @property
    def curves(self) -> list[str]:
        """A curve's name for each value that `compare` gives; none where the transfer loss says it all."""
        return []

    @property
    def kind(self) -> Any:
        """Equal for transfers of which a stack of students needs but one; else each is a kind of its own."""
        return id(self)

    def task_logits(self, student: ModelOutput) -> Tensor:
        """The student's logits [*S, B, K] that learn the labels."""
        return student.logits

    @abstractmethod
    def compare(self, student: ModelOutput, teacher: Answer) -> Tensor:
        """How far apart the two are [*S, P]: one value a pair of maps, or one value in all."""

    @abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """The transfer loss [*S] of the values [*S, P] that `compare` gave."""


class AttentionTransfer(Transfer):
    """Compares the chosen student maps with their teacher maps.

    Args:
        pairs: what learns from what.
        loss: what makes two maps alike; its `reduction` sets the maps' weights.
        alignment: what makes the two models' maps comparable.
        tokens: the larger of N and N', where it is known.
        control: what takes the teacher maps' place (a key of `CONTROLS`), if anything.
    """

    def __init__(
        self,
        pairs: Sequence[BlockPair],
        loss: AttentionLoss,
        alignment: Alignment = AS_THEY_ARE,
        tokens: int = 0,
        control: str | None = None,
    ) -> None:
        super().__init__()
        assert pairs
        self.pairs = tuple(pairs)
        self.loss = loss
        self.names = [name for pair in pairs for name in pair.names]
        share = 1 / len(self.names) if loss.reduction == "mean" else 1.0
        # Not buffers: those would be rounded by trainer.precision=bf16-true.
        self.weights = torch.full((len(self.names),), share, dtype=torch.float64)
        self.alignment = alignment
        self.resize = alignment.resize
        # Not a buffer either: an average of a model's weights is one of its buffers, too.
        self.allowed = alignment.allowed
        self.streams = tokens > STREAM_ABOVE
        self.control = control

    @property
    def curves(self) -> list[str]:
        return [f"map_loss/{name}" for name in self.names]

    @property
    def kind(self) -> Any:
        # A stack gives each of its students a temperature.
        settings = {key: value for key, value in asdict(self.loss).items() if key != "temperature"}
        return type(self.loss), settings, self.pairs, self.control

    def compare(self, student: ModelOutput, teacher: Answer) -> Tensor:
        """One value per student map [*S, P]."""
        return self(student.scores, teacher.scores)

    def forward(self, student: Mapping[int, Scores], teacher: Mapping[int, Scores]) -> Tensor:
        """One value per student map [*S, P] from scores [*S, B, H, N, N] and [B, H', N', N'] per block.

        Of factors, the teacher's are constants: it is frozen.
        """
        values = [
            self._compare(pair, student[pair.student_block], self._taught(teacher[pair.teacher_block]))
            for pair in self.pairs
        ]
        return torch.cat(values, dim=-1)

    def total(self, values: Tensor) -> Tensor:
        """The transfer loss [*S] of the values [*S, P] that `forward` gave."""
        self.weights = self.weights.to(values)
        return (values * self.weights).sum(-1)

    def _taught(self, teacher: Scores) -> Scores:
        """The scores that the student is to learn from: the teacher's own, but in a control arm."""
        if self.control is None:
            return teacher
        return changed(teacher, CONTROLS[self.control])

    def _compare(self, pair: BlockPair, student: Scores, teacher: Scores) -> Tensor:
        """One value per map of `pair` [*S, P]."""
        ours = take_heads(student, pair.student_heads)
        theirs = [take_heads(teacher, heads) for heads in zip(*pair.teacher_heads, strict=True)]
        if self.alignment.drop_from_student:
            ours = without_distillation_token(ours)
        if self.alignment.drop_from_teacher:
            theirs = [without_distillation_token(maps) for maps in theirs]
        if isinstance(ours, Tensor):
            return self._loss(ours, theirs)
        chunk = images_at_a_time([ours, *(maps for maps in theirs if isinstance(maps, Factors))])
        return streamed(ours, lambda s, images: self._loss(s, [part(t, images) for t in theirs]), chunk)

    def _loss(self, student_scores: Tensor, teacher: Sequence[Scores]) -> Tensor:
        """One value per map [*S, P] of [*S, B, P, N, N]; the mean of several teacher maps is one target."""
        if self.allowed is not None:
            self.allowed = self.allowed.to(student_scores.device)
        with torch.autocast(student_scores.device.type, enabled=False):
            targets = [self._target(scores) for scores in teacher]
            target = targets[0] if len(targets) == 1 else self.loss.average(torch.stack(targets), dim=0)
            return self.loss(student_scores, target, self.allowed)

    def _target(self, teacher: Scores) -> Tensor:
        scores = teacher.scores() if isinstance(teacher, Factors) else teacher
        if self.resize is None:
            if self.allowed is not None:
                # Now: a mean of several maps would have spread what is masked over the rest of a row.
                scores = at_least_float32(scores).masked_fill(~self.allowed, MASKED)
            return self.loss.target(scores)
        target = self.loss.target(scores)
        self.resize = self.resize.to(target)
        return self.loss.resize(target, self.resize)


def take_heads(scores: Scores, heads: Sequence[int]) -> Scores:
    """The maps of `heads` out of [..., H, N, N]; a run of neighbours is a view, without copy or scatter."""
    return changed(scores, lambda x: _take(x, heads))


def _take(x: Tensor, heads: Sequence[int]) -> Tensor:
    first, count = heads[0], len(heads)
    if list(heads) == list(range(first, first + count)):
        return x.narrow(-3, first, count)
    # Not an index tensor: its gradient is a scatter, and on a GPU it would be copied over at every step.
    return torch.cat([x.narrow(-3, head, 1) for head in heads], dim=-3)


def part(scores: Scores, images: slice) -> Scores:
    """The scores of some images of the batch; a view."""
    return changed(scores, lambda x: of_images(x, images))
