"""`method=copy`: attention copy (Li, Tian, Chen, Pathak and Chen 2024, NeurIPS, arXiv 2411.09702, section 3).

In the blocks that `granularity` chooses the student computes values only and attends by its teacher's maps:

    attention(x) = softmax(Q_teacher K_teacherᵀ/√d) · V_student(x)

The class loss alone trains it: there is no transfer loss, so alpha has no effect. What it gains over the
student alone is about the most that looking where its teacher looks can give, a bound to set attention
distillation beside. It is no smaller model for that: it needs its teacher at test time, which its file holds
and its parameters count.

The paper's student has its teacher's architecture, and the teacher is pre-trained as a masked autoencoder.
The authors' code copies every head of the first 21 of 24 blocks, here `granularity.blocks=[0,1,…]`. Heads
need not be as many here: `granularity.head_map=group_mean` copies the mean weights of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vitkd.errors import ConfigError
from vitkd.methods.attention import check_equal_grids, check_maps
from vitkd.methods.base import DataFacts, MapSettings, Method
from vitkd.methods.maps.granularity import BlockPair
from vitkd.models import AttentionLayout, Model, ModelConfig, describe
from vitkd.models.copying import CopyingConfig, CopyingModel


@dataclass
class CopyDistillation(Method):
    """The student learns labels, and looks where its teacher looks."""

    ignores = "alpha", "weighting", "loss"
    why_alone = "it runs its teacher, which a stack does not hold"

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        check_maps(student, teacher, "method=logit, without maps", settings.granularity.part)
        if not student.takes_scores:
            raise ConfigError(
                f"student={student}: cannot attend by another model's maps; choose one of vitkd's own ViTs "
                "with student.attention=msa"
            )
        if settings.granularity.is_squeezed:
            raise ConfigError(
                "granularity.head_map=squeeze: weighs scores before the softmax, and method=copy copies "
                "attention weights; use index or group_mean"
            )
        if settings.granularity.is_matched:
            raise ConfigError(
                "granularity.head_map=hungarian: matches heads by the student's maps, and method=copy leaves "
                "it none; use index or group_mean"
            )
        students, teachers = student.attention_layouts(), teacher.attention_layouts()
        for pair in settings.granularity.pairs(students, teachers):
            check_copy(pair, students[pair.student_block], teachers[pair.teacher_block])

    def trained(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> CopyingModel:
        pairs = settings.granularity.pairs(student.attention, teacher.attention)
        return copying(student, teacher, pairs)

    def objective(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> None:
        return None


def check_copy(pair: BlockPair, student: AttentionLayout, teacher: AttentionLayout) -> None:
    """ConfigError unless the maps of the teacher's block are of the student block's tokens, for all heads."""
    if len(pair.student_heads) != student.heads:
        raise ConfigError(
            f"granularity: names {len(pair.student_heads)} of the {student.heads} heads of student block "
            f"{pair.student_block}, and method=copy copies whole blocks; use granularity=block or encoder"
        )
    check_equal_grids(student, teacher, "method=copy needs equal patch sizes")
    if teacher.windows > 1:
        raise ConfigError(
            f"granularity: teacher block {pair.teacher_block} attends within windows, whose maps a ViT "
            "cannot copy; choose a ViT as teacher"
        )
    prefixes = [(layout.prefix, layout.has_class_token) for layout in (student, teacher)]
    if prefixes[0] != prefixes[1]:
        raise ConfigError(
            f"method=copy: the student has {student.prefix} tokens before its patches and the teacher "
            f"{teacher.prefix}; set student.distillation_token or choose a teacher to make them equal"
        )


def copying(student: Model, teacher: Model, pairs: Sequence[BlockPair]) -> CopyingModel:
    """The two as one model."""
    config = CopyingConfig(
        **{name: getattr(student.config, name) for name in ("image_size", "channels", "num_classes")},
        student=describe(student),
        teacher=describe(teacher),
        copies=[
            [pair.student_block, pair.teacher_block, [[*heads] for heads in pair.teacher_heads]]
            for pair in pairs
        ],
    )
    return CopyingModel(config, student, teacher)
