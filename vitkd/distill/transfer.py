"""The transfer loss: teacher scores + student scores → one value per student map, and their weighted sum.

Shapes: S stacked students (absent for one), B batch, H heads, P student maps of all pairs, N tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.distill.losses import AttentionLoss
from vitkd.distill.pairing import BlockPair


class AttentionTransfer(nn.Module):
    """Compares the chosen student maps with their teacher maps. It has no parameters.

    Args:
        pairs: what learns from what.
        loss: what makes two maps alike; its `reduction` sets the maps' weights.
        resize: [N, N'] interpolates the teacher's tokens to the student's grid, if they differ.
        allowed: [N, N] is False where a model masks attention.
    """

    allowed: Tensor | None
    """[N, N]: False where a model masks attention; those entries stay out of every mean"""

    def __init__(
        self,
        pairs: Sequence[BlockPair],
        loss: AttentionLoss,
        resize: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert pairs
        self.pairs = tuple(pairs)
        self.loss = loss
        self.names = [name for pair in pairs for name in pair.names]
        share = 1 / len(self.names) if loss.reduction == "mean" else 1.0
        # Not buffers: those would be rounded by trainer.precision=bf16-true.
        self.weights = torch.full((len(self.names),), share, dtype=torch.float64)
        self.resize = resize
        self.register_buffer("allowed", allowed, persistent=False)

    @property
    def student_blocks(self) -> list[int]:
        return [pair.student_block for pair in self.pairs]

    @property
    def teacher_blocks(self) -> list[int]:
        return sorted({pair.teacher_block for pair in self.pairs})

    def forward(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
        """One value per student map [*S, P] from scores [*S, B, H, N, N] and [B, H', N', N'] per block."""
        device = student[self.pairs[0].student_block].device.type
        with torch.autocast(device, enabled=False):
            return torch.cat([self._compare(pair, student, teacher) for pair in self.pairs], dim=-1)

    def total(self, per_map: Tensor) -> Tensor:
        """The transfer loss [*S] of the values [*S, P] that `forward` gave."""
        self.weights = self.weights.to(per_map)
        return (per_map * self.weights).sum(-1)

    def _compare(
        self, pair: BlockPair, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]
    ) -> Tensor:
        scores = take_heads(student[pair.student_block], pair.student_heads)
        return self.loss(scores, self._target(pair, teacher[pair.teacher_block]), self.allowed)

    def _target(self, pair: BlockPair, teacher_scores: Tensor) -> Tensor:
        groups = zip(*pair.teacher_heads, strict=True)
        targets = [self.loss.target(take_heads(teacher_scores, heads)) for heads in groups]
        if self.resize is not None:
            self.resize = self.resize.to(targets[0])
            targets = [self.loss.resize(target, self.resize) for target in targets]
        return targets[0] if len(targets) == 1 else self.loss.average(torch.stack(targets), dim=0)


def take_heads(scores: Tensor, heads: Sequence[int]) -> Tensor:
    """The maps of `heads` out of [..., H, N, N]; a run of neighbours is a view, without copy or scatter."""
    first, count = heads[0], len(heads)
    if list(heads) == list(range(first, first + count)):
        return scores.narrow(-3, first, count)
    # Not an index tensor: its gradient is a scatter, and on a GPU it would be copied over at every step.
    return torch.cat([scores.narrow(-3, head, 1) for head in heads], dim=-3)


def token_interpolation(from_grid: int, to_grid: int) -> Tensor:
    """The matrix [1 + to_grid², 1 + from_grid²] that resizes a token axis bilinearly and keeps CLS.

    Each row sums to 1.
    """
    tokens = from_grid**2
    basis = torch.eye(tokens).reshape(tokens, 1, from_grid, from_grid)
    resized = F.interpolate(basis, size=(to_grid, to_grid), mode="bilinear", align_corners=False)
    return torch.block_diag(torch.ones(1, 1), resized.reshape(tokens, to_grid**2).T)
