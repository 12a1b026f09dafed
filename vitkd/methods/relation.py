"""`method=relation`: self-attention relations (MiniLMv2: Wang et al. 2021, arXiv 2012.15828, section 3).

A relation compares every token with every other by one or two of an attention's queries, keys and values. For
each of these, A_i and A_j, all heads are concatenated and split again into `relation_heads` of width d_r:

    R_ij = softmax(A_i A_jᵀ / √d_r)
    L = mean over relations, relation heads and tokens of KL(R_teacher ‖ R_student)

So neither the number nor the size of heads has to be the teacher's. `relations=same` takes Q–Q, K–K and V–V,
as the paper does; `all` takes the nine pairs, as MiniViT does for vision (Zhang et al. 2022, arXiv
2204.07154, section 3.3, with cross-entropy, whose student gradient is KL's). The papers sum over relations;
ours is their mean, weighted by 1 − alpha.

Shapes: S stacked students (absent for one), B batch, H heads, T tokens, R relation heads, P relations of all
pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import ConfigError, check, check_choice
from vitkd.methods.attention import check_equal_grids, check_maps
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.methods.maps.alignment import align, without_tokens
from vitkd.methods.maps.losses import kl_divergence
from vitkd.models import AttentionLayout, Model, ModelConfig, Output, Taps
from vitkd.models.output import OUTER, QKV, at_least_float32

RELATIONS = {"same": ("qq", "kk", "vv"), "all": tuple(map("".join, product("qkv", repeat=2)))}


class RelatedBlocks(NamedTuple):
    """A student block and the teacher block whose relations it learns."""

    student_block: int
    teacher_block: int
    relation_heads: int
    dropped_from_student: int
    """how many tokens after the `kept` first only the student has"""
    dropped_from_teacher: int
    """how many only the teacher has"""
    kept: int
    """1, the class token, or 0 where a model has none"""


class RelationObjective(Objective):
    """Compares the relations of chosen blocks.

    Args:
        blocks: which student block learns from which teacher block.
        relations: pairs of q, k and v, each as two letters.
    """

    def __init__(self, blocks: Sequence[RelatedBlocks], relations: Sequence[str]) -> None:
        super().__init__()
        self.blocks, self.relations = tuple(blocks), tuple(relations)
        self.student_taps = Taps(qkv=tuple(pair.student_block for pair in blocks))
        self.teacher_taps = Taps(qkv=tuple(sorted({pair.teacher_block for pair in blocks})), logits=False)
        names = product((pair.student_block for pair in blocks), relations)
        self.curves = tuple(f"relation_loss/{block}.{relation}" for block, relation in names)

    @property
    def stack_key(self) -> Any:
        return type(self), self.blocks, self.relations

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        values = [
            self._compare(pair, student.qkv[pair.student_block], teacher.qkv[pair.teacher_block])
            for pair in self.blocks
        ]
        return {"relation_loss": torch.cat(values, dim=-1)}

    def transfer(self, terms: Terms) -> Tensor:
        return terms["relation_loss"].mean(-1)

    def _compare(self, pair: RelatedBlocks, student: QKV, teacher: QKV) -> Tensor:
        """The divergence of each relation of one pair of blocks [*S, B, relations]."""
        students = split_heads(student, pair.dropped_from_student, pair.relation_heads, pair.kept)
        teachers = split_heads(teacher, pair.dropped_from_teacher, pair.relation_heads, pair.kept)
        with torch.autocast(student.q.device.type, enabled=False):
            rows = [
                kl_divergence(log_relation(teachers, relation), log_relation(students, relation))
                for relation in self.relations
            ]
            return torch.stack([values.mean((-2, -1)) for values in rows], dim=-1)


def split_heads(qkv: QKV, dropped: int, count: int, kept: int = 1) -> dict[str, Tensor]:
    """Q, K and V [*S, B, H, dropped + T, head_dim] as `count` heads each, [*S, B, R, T, H·head_dim/R].

    Left out are the `dropped` tokens after the `kept` first.
    """

    def split(x: Tensor) -> Tensor:
        tokens = without_tokens(at_least_float32(x), kept, kept + dropped).transpose(-3, -2).flatten(-2)
        return tokens.unflatten(-1, (count, tokens.shape[-1] // count)).transpose(-3, -2)

    assert qkv.v is not None
    return {"q": split(qkv.q), "k": split(qkv.k), "v": split(qkv.v)}


def log_relation(heads: dict[str, Tensor], relation: str) -> Tensor:
    """log softmax(A_i A_jᵀ / √d_r) [*S, B, R, T, T] for a relation such as "qk"."""
    first, second = (heads[name] for name in relation)
    return ((first * first.shape[-1] ** -0.5) @ second.mT).log_softmax(-1)


@dataclass
class RelationDistillation(Method):
    """The student learns labels and how its teacher's tokens relate to each other."""

    relations: str = "same"
    """same, Q–Q, K–K and V–V | all, the nine pairs of Q, K and V"""
    relation_heads: int | None = None
    """null takes as many as the student's block has heads"""

    ignores = "loss", "granularity.heads", "granularity.head_map"

    def __post_init__(self) -> None:
        check_choice(self, "relations", RELATIONS)
        is_count = self.relation_heads is None or self.relation_heads >= 1
        check(self, "relation_heads", is_count, "must be at least 1, or null")

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        check_maps(student, teacher, "method=logit, without maps")
        if (part := settings.granularity.part) != OUTER:
            raise ConfigError(
                f"granularity.part={part}: method=relation relates patches to each other, not what is within "
                f"them; set part={OUTER}, or method=attention"
            )
        self._related(student.attention_layouts(), teacher.attention_layouts(), settings)

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> RelationObjective:
        blocks = self._related(student.attention, teacher.attention, settings)
        return RelationObjective(blocks, RELATIONS[self.relations])

    def _related(
        self, students: Sequence[AttentionLayout], teachers: Sequence[AttentionLayout], settings: MapSettings
    ) -> list[RelatedBlocks]:
        """The chosen pairs of blocks; ConfigError where their tokens or widths do not fit."""
        pairs = settings.granularity.block_pairs(len(students), len(teachers))
        return [RelatedBlocks(s, t, *self._fit(students[s], teachers[t])) for s, t in pairs]

    def _fit(self, student: AttentionLayout, teacher: AttentionLayout) -> tuple[int, int, int, int]:
        """The relation heads of a pair of blocks, the tokens that each side leaves out, and those before."""
        if max(student.windows, teacher.windows) > 1:
            raise ConfigError(
                "method=relation relates every token to every other, not those of windows alone; choose "
                "method=attention, or granularity.blocks of a single window"
            )
        check_equal_grids(student, teacher, "method=relation needs equal patch sizes")
        heads = self.relation_heads or student.heads
        for owner, layout in (("student", student), ("teacher", teacher)):
            if (width := layout.heads * layout.head_dim) % heads:
                raise ConfigError(
                    f"method.relation_heads={heads}: does not divide the {owner}'s attention width {width} "
                    "(num_heads·head_dim); choose a divisor of both models' widths"
                )
        alignment = align(student, teacher)
        return heads, alignment.dropped_from_student, alignment.dropped_from_teacher, alignment.kept
