"""Attention transfer: student scores and teacher scores → one value per image and student map.

Beyond `STREAM_ABOVE` tokens the models return only the scores' factors, which are multiplied out for a few
images at a time (`streaming`). Control arms (`CONTROLS`) replace the teacher's maps by something else, to see
whether these are what helps.

Shapes: S stacked students, U data orders (absent for one), B batch, H heads, P student maps of all pairs, N
tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.methods.base import Objective, Terms
from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment, without_prefix
from vitkd.methods.maps.granularity import BlockPair
from vitkd.methods.maps.losses import MASKED, AttentionLoss, DistributionLoss
from vitkd.methods.maps.streaming import STREAM_ABOVE, images_at_a_time, of_images, streamed
from vitkd.models import Output, Taps
from vitkd.models.output import QKV, at_least_float32, select

Maps = Tensor | QKV
"""scores [*S, B, H, N, N], or the factors that make them"""


def shuffled(scores: Tensor) -> Tensor:
    """To each image the maps of its neighbour in the batch.

    The teacher's patterns without what they have to do with the image. Every epoch has its own batches, so an
    image gets other maps each time.
    """
    return scores.roll(1, dims=-4)


def uniform(scores: Tensor) -> Tensor:
    """Attention to all tokens alike: smoothing, and nothing of the teacher."""
    return torch.zeros_like(scores)


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {"shuffled": shuffled, "uniform": uniform}
"""name → what it makes of scores [*U, B, H, N, N], or of either of their factors [*U, B, H, N, head_dim]"""


class AttentionObjective(Objective):
    """Compares the chosen student maps with their teacher maps.

    Args:
        pairs: what learns from what.
        loss: what makes two maps alike; its `reduction` sets the maps' weights.
        alignments: for each pair what makes the maps comparable; none if they are as they are.
        tokens: the larger of N and N', where it is known and queries and keys alone make the scores.
        control: what takes the teacher maps' place (a key of `CONTROLS`), if anything.
    """

    def __init__(
        self,
        pairs: Sequence[BlockPair],
        loss: AttentionLoss,
        alignments: Sequence[Alignment] = (),
        tokens: int = 0,
        control: str | None = None,
    ) -> None:
        super().__init__()
        assert pairs
        self.pairs, self.loss, self.control = tuple(pairs), loss, control
        # Not buffers: an average of a model's weights would be one of its buffers, too.
        self.alignments = [
            alignment._replace(heads=torch.tensor(pair.weights)) if pair.weights else alignment
            for pair, alignment in zip(pairs, alignments or [AS_THEY_ARE] * len(pairs), strict=True)
        ]
        self.streams = tokens > STREAM_ABOVE
        students = tuple(pair.student_block for pair in pairs)
        teachers = tuple(sorted({pair.teacher_block for pair in pairs}))
        (part,) = {pair.part for pair in pairs}
        of_student, of_teacher = (
            Taps(factors=blocks, part=part) if self.streams else Taps(scores=blocks, part=part)
            for blocks in (students, teachers)
        )
        self.student_taps, self.teacher_taps = of_student, of_teacher._replace(logits=False)
        self.curves = tuple(f"map_loss/{name}" for pair in pairs for name in pair.names)
        self.min_images = 2 if control == "shuffled" else 1

    @property
    def stack_key(self) -> Any:
        # A stack gives each of its students a temperature.
        settings = {key: value for key, value in asdict(self.loss).items() if key != "temperature"}
        return type(self), type(self.loss), settings, self.pairs, self.control

    def shared_by(self, objectives: Sequence[Objective]) -> Objective:
        """With a temperature for each student [S, 1, 1, 1, 1], where these differ."""
        losses = [each.loss for each in objectives if isinstance(each, AttentionObjective)]
        temperatures = [loss.temperature for loss in losses if isinstance(loss, DistributionLoss)]
        if len(set(temperatures)) < 2:
            return self
        shared = copy(self)
        shared.loss = copy(self.loss)
        exact = torch.tensor(temperatures, dtype=torch.float64)
        shared.loss.temperature = exact.reshape(-1, 1, 1, 1, 1)  # type: ignore[attr-defined]
        return shared

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        return {"map_loss": self.compare(self._maps(student), self._maps(teacher))}

    def compare(self, student: Mapping[int, Maps], teacher: Mapping[int, Maps]) -> Tensor:
        """One value per image and student map [*S, B, P], from the maps of the paired blocks.

        Of factors, the teacher's are constants: it is frozen.
        """
        change = CONTROLS.get(self.control or "", lambda maps: maps)
        # They stay there: a CUDA graph cannot copy from the host.
        first = next(iter(student.values()))
        device = (first if isinstance(first, Tensor) else first.q).device
        self.alignments = [alignment.to(device) for alignment in self.alignments]
        values = [
            self._compare(
                pair, alignment, student[pair.student_block], mapped(teacher[pair.teacher_block], change)
            )
            for pair, alignment in zip(self.pairs, self.alignments, strict=True)
        ]
        return torch.cat(values, dim=-1)

    def transfer(self, terms: Terms) -> Tensor:
        values = terms["map_loss"]
        if self.loss.reduction == "sum_blocks":
            blocks = values.split([len(pair.student_heads) for pair in self.pairs], dim=-1)
            return torch.stack([maps.mean(-1) for maps in blocks], dim=-1).sum(-1)
        return values.mean(-1) if self.loss.reduction == "mean" else values.sum(-1)

    def _maps(self, output: Output) -> Mapping[int, Maps]:
        return output.qkv if self.streams else output.scores

    def _compare(self, pair: BlockPair, alignment: Alignment, student: Maps, teacher: Maps) -> Tensor:
        """One value per image and map of `pair` [*S, B, P]."""
        dropped, kept = alignment.dropped_from_student, alignment.kept
        students = without_prefix(take_heads(student, pair.student_heads), dropped, kept)
        teachers = [
            without_prefix(take_heads(teacher, heads), alignment.dropped_from_teacher, kept)
            for heads in pair.taken_together
        ]
        if isinstance(students, Tensor):
            return self._loss(alignment, students, teachers)
        chunk = images_at_a_time([students, *(maps for maps in teachers if isinstance(maps, QKV))])

        def compare(scores: Tensor, images: slice) -> Tensor:
            of_teachers = [mapped(maps, lambda x: of_images(x, images)) for maps in teachers]
            return self._loss(alignment, scores, of_teachers)

        return streamed(students, compare, chunk)

    def _loss(self, alignment: Alignment, student_scores: Tensor, teachers: Sequence[Maps]) -> Tensor:
        """One value per map [*S, B, P] of [*S, B, P, N, N]; several teacher maps make one target."""
        with torch.autocast(student_scores.device.type, enabled=False):
            targets = [self._target(alignment, maps) for maps in teachers]
            target = targets[0] if len(targets) == 1 else self.loss.average(torch.stack(targets), dim=0)
            return self.loss(student_scores, target, alignment.allowed)

    def _target(self, alignment: Alignment, maps: Maps) -> Tensor:
        scores = maps.scores() if isinstance(maps, QKV) else maps
        if alignment.heads is not None:
            scores = at_least_float32(scores)
            scores = torch.einsum("ph,...hqk->...pqk", alignment.heads.to(scores), scores)
        if alignment.resize is not None:
            target = self.loss.target(scores)
            return self.loss.resize(target, alignment.resize.to(target))
        if alignment.allowed is not None:
            # Now: a mean of several maps would have spread what is masked over the rest of a row.
            scores = at_least_float32(scores).masked_fill(~alignment.allowed, MASKED)
        return self.loss.target(scores)


def take_heads(maps: Maps, heads: Sequence[int]) -> Maps:
    """The maps of `heads` out of [..., H, N, N]."""
    return mapped(maps, lambda x: select(x, heads, dim=-3))


def mapped(maps: Maps, change: Callable[[Tensor], Tensor]) -> Maps:
    """Scores, or each of their factors, after `change`."""
    return change(maps) if isinstance(maps, Tensor) else maps.map(change)
