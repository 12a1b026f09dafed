"""Comparisons of attention maps for modules that tests build without a configuration."""

from vitkd.methods.maps.alignment import align
from vitkd.methods.maps.granularity import Encoder, Granularity
from vitkd.methods.maps.losses import KL, AttentionLoss
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.models import Model


def compare_maps(
    student: Model,
    teacher: Model,
    granularity: Granularity | None = None,
    loss: AttentionLoss | None = None,
    tokens: int = 0,
) -> AttentionObjective:
    """All maps of the encoder by KL, unless said otherwise."""
    pairs = (granularity or Encoder()).pairs(student.attention, teacher.attention)
    layouts = [
        (student.attention[pair.student_block], teacher.attention[pair.teacher_block]) for pair in pairs
    ]
    return AttentionObjective(pairs, loss or KL(), [align(*both) for both in layouts], tokens)
