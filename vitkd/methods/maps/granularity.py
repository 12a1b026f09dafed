"""Which student maps learn from which teacher maps: chosen heads, whole blocks, or the whole encoder.

Each granularity is its own configuration schema and yields `BlockPair`s; nothing downstream knows which one
it was.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vitkd.errors import ConfigError, check_choice
from vitkd.models import AttentionLayout
from vitkd.models.output import OUTER, PARTS

Layouts = Sequence[AttentionLayout]
"""of each block of a model"""
HeadPairs = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""student heads, and for each of them its teacher heads"""
HEAD_MAPS = ("index", "group_mean", "hungarian", "squeeze")


@dataclass(frozen=True)
class BlockPair:
    """The maps of one student block and the teacher maps they learn from."""

    student_block: int
    teacher_block: int
    student_heads: tuple[int, ...]
    teacher_heads: tuple[tuple[int, ...], ...]
    """For each student head the teacher heads whose mean is its target (mostly one)."""
    part: str = OUTER
    """Which attention of both blocks, where a block has several."""
    weights: tuple[tuple[float, ...], ...] = ()
    """If any: for each student head a weight for each of its teacher heads, here all, whose weighted sum of
    scores is its target instead."""

    @property
    def names(self) -> list[str]:
        """`block.head` of each student map."""
        return [f"{self.student_block}.{head}" for head in self.student_heads]

    @property
    def taken_together(self) -> list[tuple[int, ...]]:
        """Teacher heads by map: the first of each mean, the second, …; or all those of a weighted sum."""
        return [self.teacher_heads[0]] if self.weights else [*zip(*self.teacher_heads, strict=True)]


@dataclass
class Granularity(ABC):
    """The student maps that learn, and the teacher maps they learn from."""

    blocks: list[int] | None = None
    """Student blocks; negative ones count from the end; null is the granularity's own choice."""
    teacher_blocks: list[int] | None = None
    """The teacher block of each; null maps by depth (`map_block`)."""
    part: str = OUTER
    """outer, the attention among patches | inner, a TNT's within each patch."""

    def __post_init__(self) -> None:
        check_choice(self, "part", PARTS)

    @property
    def is_matched(self) -> bool:
        """Whether `match_heads` has yet to settle the pairs, by the loss of both models' scores."""
        return False

    @property
    def is_squeezed(self) -> bool:
        """Whether `squeeze_heads` has yet to weigh the teacher heads, by their scores."""
        return False

    def pairs(self, student: Layouts, teacher: Layouts) -> list[BlockPair]:
        """One `BlockPair` a chosen student block.

        Raises ConfigError where a block or head does not exist or the heads do not fit.
        """
        blocks = self.block_pairs(len(student), len(teacher))
        heads = [self.head_pairs(student[s].heads, teacher[t].heads) for s, t in blocks]
        return [BlockPair(*pair, *its, self.part) for pair, its in zip(blocks, heads, strict=True)]

    @abstractmethod
    def head_pairs(self, student_heads: int, teacher_heads: int) -> HeadPairs:
        """Which heads of a chosen block learn, and from which, where its models have so many."""

    def default_blocks(self, depth: int) -> list[int]:
        """The student blocks where none are named: the last, which the class token reads."""
        return [depth - 1]

    def block_pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """(student block, teacher block) pairs, checked."""
        chosen = self.default_blocks(student_depth) if self.blocks is None else self.blocks
        students = [existing("blocks", block, student_depth, "the student") for block in chosen]
        if not students or len(set(students)) != len(students):
            raise ConfigError(f"granularity.blocks={chosen}: name at least one block, and each only once")
        if self.teacher_blocks is None:
            return [(block, map_block(block, student_depth, teacher_depth)) for block in students]
        if len(self.teacher_blocks) != len(students):
            raise ConfigError(
                f"granularity.teacher_blocks={self.teacher_blocks}: name one for each of the {len(students)} "
                "student blocks, or null to map them by depth"
            )
        teachers = [
            existing("teacher_blocks", block, teacher_depth, "the teacher") for block in self.teacher_blocks
        ]
        return list(zip(students, teachers, strict=True))


@dataclass
class Head(Granularity):
    """Chosen heads of chosen blocks; by default the last block's head 0 from the teacher's head 0."""

    heads: list[list[int]] | None = None
    """[student head, teacher head] pairs."""

    def head_pairs(self, student_heads: int, teacher_heads: int) -> HeadPairs:
        heads = [[0, 0]] if self.heads is None else self.heads
        if not heads or any(len(pair) != 2 for pair in heads):
            raise ConfigError(
                f"granularity.heads={heads}: write [student head, teacher head] pairs, for example [[0,2]]"
            )
        students = tuple(existing("heads", pair[0], student_heads, "the student") for pair in heads)
        teachers = tuple((existing("heads", pair[1], teacher_heads, "the teacher"),) for pair in heads)
        if len(set(students)) != len(students):
            raise ConfigError(
                f"granularity.heads={heads}: each student head learns from one teacher head only"
            )
        return students, teachers


@dataclass
class Block(Granularity):
    """Every head of chosen blocks, by default of the last."""

    head_map: str = "index"
    """index | group_mean | hungarian | squeeze: see `map_heads`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "head_map", HEAD_MAPS)

    @property
    def is_matched(self) -> bool:
        return self.head_map == "hungarian"

    @property
    def is_squeezed(self) -> bool:
        return self.head_map == "squeeze"

    def head_pairs(self, student_heads: int, teacher_heads: int) -> HeadPairs:
        return tuple(range(student_heads)), map_heads(self.head_map, student_heads, teacher_heads)


@dataclass
class Encoder(Block):
    """Every head of every block."""

    def default_blocks(self, depth: int) -> list[int]:
        return list(range(depth))


def existing(key: str, number: int, count: int, owner: str) -> int:
    """`number` as a non-negative index below `count`; ConfigError where there is no such block or head."""
    if not -count <= number < count:
        raise ConfigError(
            f"granularity.{key}: {owner} has no {'head' if key == 'heads' else 'block'} {number}, only 0 to "
            f"{count - 1} (or -1 for the last)"
        )
    return number % count


def map_block(student_block: int, student_depth: int, teacher_depth: int) -> int:
    """Student block i learns from teacher block floor((i+1)·n/m) − 1: the last from the last."""
    return max((student_block + 1) * teacher_depth // student_depth - 1, 0)


def map_heads(head_map: str, student_heads: int, teacher_heads: int) -> tuple[tuple[int, ...], ...]:
    """The teacher heads of each student head.

    `index` pairs head i with head i (the report's); `group_mean` with the mean of the i-th of m equal groups;
    `hungarian` starts from `index` and is settled by `match_heads` once scores are known; so are, by
    `squeeze_heads`, the weights that `squeeze` gives all heads where the teacher has more.

    Raises ConfigError if the student has more heads than the teacher, or groups would be unequal.
    """
    if student_heads > teacher_heads:
        raise ConfigError(
            f"student.num_heads={student_heads} is more than teacher.num_heads={teacher_heads}: "
            f"use at most {teacher_heads}, or granularity=head with chosen heads"
        )
    if head_map == "squeeze" and student_heads < teacher_heads:
        return (tuple(range(teacher_heads)),) * student_heads
    if head_map != "group_mean":
        return tuple((head,) for head in range(student_heads))
    if teacher_heads % student_heads:
        raise ConfigError(
            f"granularity.head_map=group_mean cannot share teacher.num_heads={teacher_heads} evenly among "
            f"student.num_heads={student_heads}: use a divisor of {teacher_heads}, head_map=index or squeeze"
        )
    size = teacher_heads // student_heads
    return tuple(tuple(range(head * size, (head + 1) * size)) for head in range(student_heads))
