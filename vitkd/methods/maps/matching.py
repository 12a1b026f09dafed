"""`head_map=hungarian`: which teacher head each student head learns from, settled by what they see.

Shapes: B batch, H heads, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.maps.objective import AttentionTransfer
from vitkd.methods.maps.pairing import BlockPair


@torch.no_grad()
def match_heads(
    pairs: Sequence[BlockPair],
    student_scores: Mapping[int, Tensor],
    teacher_scores: Mapping[int, Tensor],
    loss: AttentionLoss,
    alignment: Alignment = AS_THEY_ARE,
) -> list[BlockPair]:
    """Pair heads so that their total loss on a calibration batch is least (Kuhn 1955, by scipy).

    Scores are [B, H, T, T] per block, recorded on the same images; `alignment` makes the two comparable.
    """
    from scipy.optimize import linear_sum_assignment  # takes a while, and hardly a run needs it

    matched = []
    for pair in pairs:
        teacher_heads = tuple((head,) for head in range(teacher_scores[pair.teacher_block].shape[1]))
        cost = []
        for head in pair.student_heads:
            beside_all = replace(
                pair, student_heads=(head,) * len(teacher_heads), teacher_heads=teacher_heads
            )
            compare = AttentionTransfer([beside_all], loss, alignment)
            cost.append(compare(student_scores, teacher_scores))
        rows, columns = linear_sum_assignment(torch.stack(cost).double().cpu().numpy())
        assert list(rows) == list(range(len(pair.student_heads)))
        matched.append(replace(pair, teacher_heads=tuple((int(column),) for column in columns)))
    return matched
