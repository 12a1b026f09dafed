"""`head_map=hungarian`: which teacher head each student head learns from, settled by what they see.

Shapes: B batch, H heads, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.maps.pairing import BlockPair


@torch.no_grad()
def match_heads(
    pairs: Sequence[BlockPair],
    student_scores: Mapping[int, Tensor],
    teacher_scores: Mapping[int, Tensor],
    loss: AttentionLoss,
    alignments: Sequence[Alignment] = (),
) -> list[BlockPair]:
    """Pair heads so that their total loss on a calibration batch is least (Kuhn 1955, by scipy).

    Scores are [B, H, T, T] per block, recorded on the same images; `alignments` make the two comparable, pair
    by pair.
    """
    from scipy.optimize import linear_sum_assignment  # takes a while, and hardly a run needs it

    matched = []
    for pair, alignment in zip(pairs, alignments or [AS_THEY_ARE] * len(pairs), strict=True):
        teacher_heads = tuple((head,) for head in range(teacher_scores[pair.teacher_block].shape[1]))
        cost = []
        for head in pair.student_heads:
            all_heads = replace(pair, student_heads=(head,) * len(teacher_heads), teacher_heads=teacher_heads)
            objective = AttentionObjective([all_heads], loss, [alignment])
            cost.append(objective.compare(student_scores, teacher_scores).mean(-2))
        rows, columns = linear_sum_assignment(torch.stack(cost).double().cpu().numpy())
        assert list(rows) == list(range(len(pair.student_heads)))
        matched.append(replace(pair, teacher_heads=tuple((int(column),) for column in columns)))
    return matched
