"""Which student map learns from which teacher map: plain data, made here, used by `objective`."""

from dataclasses import dataclass

from vitkd.errors import ConfigError

HEAD_MAPS = ("index", "group_mean", "hungarian")


@dataclass(frozen=True)
class BlockPair:
    """The maps of one student block and the teacher maps they learn from."""

    student_block: int
    teacher_block: int
    student_heads: tuple[int, ...]
    teacher_heads: tuple[tuple[int, ...], ...]
    """For each student head the teacher heads whose mean is its target (mostly one)."""

    @property
    def names(self) -> list[str]:
        """`block.head` of each student map."""
        return [f"{self.student_block}.{head}" for head in self.student_heads]


def map_block(student_block: int, student_depth: int, teacher_depth: int) -> int:
    """Student block i learns from teacher block floor((i+1)·n/m) − 1: the last from the last."""
    return max((student_block + 1) * teacher_depth // student_depth - 1, 0)


def map_heads(head_map: str, student_heads: int, teacher_heads: int) -> tuple[tuple[int, ...], ...]:
    """The teacher heads of each student head.

    `index` pairs head i with head i (the report's); `group_mean` with the mean of the i-th of m equal groups;
    `hungarian` starts from `index` and is settled by `matching` once scores are known.

    Raises ConfigError if the student has more heads than the teacher, or groups would be unequal.
    """
    if student_heads > teacher_heads:
        raise ConfigError(
            f"student.num_heads={student_heads} is more than teacher.num_heads={teacher_heads}: "
            f"use at most {teacher_heads}, or granularity=head with chosen heads"
        )
    if head_map != "group_mean":
        return tuple((head,) for head in range(student_heads))
    if teacher_heads % student_heads:
        raise ConfigError(
            f"granularity.head_map=group_mean cannot share teacher.num_heads={teacher_heads} evenly among "
            f"student.num_heads={student_heads}: use a divisor of {teacher_heads}, or head_map=index"
        )
    size = teacher_heads // student_heads
    return tuple(tuple(range(head * size, (head + 1) * size)) for head in range(student_heads))
