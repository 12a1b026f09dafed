"""`method=attention`: the student learns where its teacher looks.

Shapes: B batch, H heads, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitkd.errors import ConfigError, check_choice
from vitkd.methods.base import DataFacts, MapSettings, Method
from vitkd.methods.maps.alignment import AS_THEY_ARE, Alignment, align, how_windows_differ
from vitkd.methods.maps.granularity import BlockPair
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.maps.objective import CONTROLS, AttentionObjective
from vitkd.methods.maps.squeeze import squeeze_heads
from vitkd.models import AttentionLayout, Model, ModelConfig, Taps
from vitkd.models.output import OUTER, shown


@dataclass
class AttentionDistillation(Method):
    """The student learns labels and where the teacher looks."""

    resize: str | None = None
    """`bilinear` interpolates the teacher's maps to the student's token grid; null demands equal grids."""
    control: str | None = None
    """What is taught instead of the teacher's maps, to see whether these are what helps; see `CONTROLS`."""

    share_drop_path: bool = False
    """Whether the teacher leaves out the branches that the student leaves out in a training step (Li, Tian et
    al. 2024, arXiv 2411.09702): else a whole teacher shows where a student should look of whom parts are
    missing. The teacher's own rate has no part in that."""

    def __post_init__(self) -> None:
        check_choice(self, "control", (*CONTROLS, None))
        check_choice(self, "resize", ("bilinear", None))

    @property
    def min_batch_size(self) -> int:
        return 2 if self.control == "shuffled" else 1

    @property
    def why_alone(self) -> str | None:
        shares = "its teacher leaves out what each student does (method.share_drop_path)"
        return shares if self.share_drop_path else super().why_alone

    @property
    def why_unmixed(self) -> str | None:
        shares = "the neighbour whose maps method.control=shuffled teaches may be mixed of the same two"
        return shares if self.control == "shuffled" else None

    @property
    def why_unrepeated(self) -> str | None:
        is_same = "the neighbour whose maps method.control=shuffled teaches would be the same image"
        return is_same if self.control == "shuffled" else None

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        if self.share_drop_path:
            check_shared_drop_path(student, teacher)
        without = "method=logit or method=token" if student.attention_layouts() else "method=logit"
        part = settings.granularity.part
        check_maps(student, teacher, f"{without}, without maps", part)
        students, teachers = student.attention_layouts(part), teacher.attention_layouts(part)
        pairs = settings.granularity.pairs(students, teachers)
        check_windows(pairs, student, teacher, without)
        if self.resize is None:
            check_grids(pairs, student, teacher, "method.resize=bilinear")
        elif any(layout.mask is not None for layout in teachers):
            check_grids(pairs, student, teacher, "no teacher.attention=lsa, whose mask cannot be resized")
        elif not all(layout.has_class_token for layout in (*students, *teachers)):
            check_grids(pairs, student, teacher, "models with a class token, beside which maps are resized")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> AttentionObjective:
        objective = attention_objective(student, teacher, settings, data, self.control)
        objective.shares_drop_path = self.share_drop_path
        return objective


def check_shared_drop_path(student: ModelConfig, teacher: ModelConfig) -> None:
    """ConfigError unless the student leaves out branches, and the teacher has the same to leave out."""
    rates = student.drop_path_rates, teacher.drop_path_rates
    for owner, model, own in zip(("student", "teacher"), (student, teacher), rates, strict=True):
        if not own:
            raise ConfigError(
                f"method.share_drop_path=true: {owner}={model} is no ViT of vitkd's own; choose one, or "
                "method.share_drop_path=false"
            )
    if not any(rates[0]):
        raise ConfigError(
            "method.share_drop_path=true: the student leaves out no branches; set student.drop_path_rate=0.1"
        )
    if len(rates[0]) != len(rates[1]):
        raise ConfigError(
            f"method.share_drop_path=true: the student has {len(rates[0])} blocks, its teacher "
            f"{len(rates[1])}; set student.depth={len(rates[1])}"
        )


def check_maps(student: ModelConfig, teacher: ModelConfig, otherwise: str, part: str = OUTER) -> None:
    """ConfigError, advising `otherwise`, unless both models have attention maps, and those of `part`."""
    for owner, model in (("student", student), ("teacher", teacher)):
        if not model.attention_layouts():
            raise ConfigError(f"{owner}={model}: has no attention maps; choose a ViT, or {otherwise}")
        if not model.attention_layouts(part):
            raise ConfigError(
                f"granularity.part={part}: {owner}={model} has one attention a block; set part={OUTER}, or "
                "choose a TNT as student and as teacher"
            )


def check_windows(
    pairs: Sequence[BlockPair], student: ModelConfig, teacher: ModelConfig, otherwise: str
) -> None:
    """ConfigError, advising `otherwise`, unless paired blocks with windows have the same windows."""
    for pair in pairs:
        students, teachers = (model.attention_layouts(pair.part) for model in (student, teacher))
        layout = students[pair.student_block]
        if reason := how_windows_differ(layout, teachers[pair.teacher_block]):
            alike = [str(i) for i, other in enumerate(teachers) if not how_windows_differ(layout, other)]
            fix = (
                f"pair it with teacher block {' or '.join(alike)} by granularity.teacher_blocks"
                if alike
                else f"choose models with equal {' and '.join(reversed(layout.names))}, or {otherwise}"
            )
            raise ConfigError(
                f"granularity: student block {pair.student_block} cannot learn the maps of teacher block "
                f"{pair.teacher_block}, as {reason}; {fix}"
            )


def check_grids(
    pairs: Sequence[BlockPair], student: ModelConfig, teacher: ModelConfig, otherwise: str
) -> None:
    """ConfigError, advising `otherwise`, unless the paired blocks cut the image into as many patches."""
    for pair in pairs:
        students, teachers = (model.attention_layouts(pair.part) for model in (student, teacher))
        layouts = students[pair.student_block], teachers[pair.teacher_block]
        check_equal_grids(*layouts, f"use equal patch sizes, or {otherwise}")


def check_equal_grids(student: AttentionLayout, teacher: AttentionLayout, fix: str) -> None:
    """ConfigError that ends with `fix`, unless two blocks cut the image into as many patches."""
    if student.grid != teacher.grid:
        ours, theirs = shown(student.grid), shown(teacher.grid)
        raise ConfigError(f"the student's {ours} token grid is not the teacher's {theirs}: {fix}")


def attention_objective(
    student: Model, teacher: Model, settings: MapSettings, data: DataFacts, control: str | None = None
) -> AttentionObjective:
    """The comparison of maps that the settings' granularity and loss describe."""
    part = settings.granularity.part
    students, teachers = (model.config.attention_layouts(part) for model in (student, teacher))
    pairs = settings.granularity.pairs(students, teachers)
    paired = [(students[pair.student_block], teachers[pair.teacher_block]) for pair in pairs]
    alignments = [align(*layouts) for layouts in paired]
    if settings.granularity.is_squeezed:
        pairs = squeeze_heads(pairs, alignments, teacher, data.calibration())
    elif settings.granularity.is_matched:
        both = record_both(student, teacher, pairs, data.calibration())
        pairs = match_heads(pairs, *both, settings.loss, alignments)
    # Only where queries and keys alone make the scores can these be made of them.
    can_stream = not any(each.has_bias or each.windows > 1 for layouts in paired for each in layouts)
    tokens = max(layout.tokens for layout in (*students, *teachers)) if can_stream else 0
    return AttentionObjective(pairs, settings.loss, alignments, tokens, control)


@torch.no_grad()
def record_both(
    student: Model, teacher: Model, pairs: Sequence[BlockPair], images: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The scores of the paired blocks of both models in eval mode; no random number is drawn."""
    was_training = student.training
    part = pairs[0].part
    of_student = Taps(scores=tuple(pair.student_block for pair in pairs), logits=False, part=part)
    of_teacher = Taps(scores=tuple(pair.teacher_block for pair in pairs), logits=False, part=part)
    student_scores = student.eval()(images, of_student).scores
    student.train(was_training)
    return student_scores, teacher.eval()(images, of_teacher).scores


@torch.no_grad()
def match_heads(
    pairs: Sequence[BlockPair],
    student_scores: Mapping[int, Tensor],
    teacher_scores: Mapping[int, Tensor],
    loss: AttentionLoss,
    alignments: Sequence[Alignment] = (),
) -> list[BlockPair]:
    """`head_map=hungarian`: the pairs whose total loss on a calibration batch is least (Kuhn 1955, by scipy).

    Scores are [B, H, Q, K] per block, recorded on the same images; `alignments` make the two comparable, pair
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
