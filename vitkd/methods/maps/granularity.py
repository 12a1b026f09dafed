"""How much of the encoder is distilled: chosen heads, whole blocks, or everything.

Each class is its own configuration schema and yields `BlockPair`s; nothing downstream knows which one it was.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from vitkd.errors import ConfigError
from vitkd.methods.maps.pairing import HEAD_MAPS, BlockPair, map_block, map_heads


class Shape(Protocol):
    """What pairing has to know of a model; every model's config has it."""

    depth: int
    num_heads: int


@dataclass
class Granularity(ABC):
    """The student maps that learn, and the teacher maps they learn from."""

    blocks: list[int] | None = None
    """Student blocks; negative ones count from the end; null is the granularity's own choice."""
    teacher_blocks: list[int] | None = None
    """The teacher block of each; null maps by depth (`map_block`)."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `match_heads` has yet to settle the pairs on real scores."""
        return False

    def pairs(self, student: Shape, teacher: Shape) -> list[BlockPair]:
        """One `BlockPair` a chosen student block.

        Raises ConfigError where a block or head does not exist or the heads do not fit.
        """
        ours, theirs = self.heads_of(student, teacher)
        return [BlockPair(s, t, ours, theirs) for s, t in self.block_pairs(student, teacher)]

    @abstractmethod
    def heads_of(self, student: Shape, teacher: Shape) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """The student heads of each chosen block, and for each of them its teacher heads."""

    def default_blocks(self, depth: int) -> list[int]:
        """The student blocks where none are named: the last, which the class token reads."""
        return [depth - 1]

    def block_pairs(self, student: Shape, teacher: Shape) -> list[tuple[int, int]]:
        """(student block, teacher block) pairs, checked."""
        chosen = self.default_blocks(student.depth) if self.blocks is None else self.blocks
        ours = [existing("blocks", block, student.depth, "the student") for block in chosen]
        if not ours or len(set(ours)) != len(ours):
            raise ConfigError(f"granularity.blocks={chosen}: name at least one block, and each only once")
        if self.teacher_blocks is None:
            return [(block, map_block(block, student.depth, teacher.depth)) for block in ours]
        if len(self.teacher_blocks) != len(ours):
            raise ConfigError(
                f"granularity.teacher_blocks={self.teacher_blocks}: name one for each of the {len(ours)} "
                "student blocks, or null to map them by depth"
            )
        theirs = [
            existing("teacher_blocks", block, teacher.depth, "the teacher") for block in self.teacher_blocks
        ]
        return list(zip(ours, theirs, strict=True))


@dataclass
class Head(Granularity):
    """Chosen heads of chosen blocks; by default the last block's head 0 from the teacher's head 0."""

    heads: list[list[int]] | None = None
    """[student head, teacher head] pairs."""

    def heads_of(self, student: Shape, teacher: Shape) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        heads = [[0, 0]] if self.heads is None else self.heads
        if not heads or any(len(pair) != 2 for pair in heads):
            raise ConfigError(
                f"granularity.heads={heads}: write [student head, teacher head] pairs, for example [[0,2]]"
            )
        ours = tuple(existing("heads", pair[0], student.num_heads, "the student") for pair in heads)
        theirs = tuple((existing("heads", pair[1], teacher.num_heads, "the teacher"),) for pair in heads)
        if len(set(ours)) != len(ours):
            raise ConfigError(
                f"granularity.heads={heads}: each student head learns from one teacher head only"
            )
        return ours, theirs


@dataclass
class Block(Granularity):
    """Every head of chosen blocks, by default of the last."""

    head_map: str = "index"
    """index | group_mean | hungarian: see `map_heads`."""

    def __post_init__(self) -> None:
        if self.head_map not in HEAD_MAPS:
            raise ConfigError(f"head_map={self.head_map}: choose one of {', '.join(HEAD_MAPS)}")

    @property
    def needs_calibration(self) -> bool:
        return self.head_map == "hungarian"

    def heads_of(self, student: Shape, teacher: Shape) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        return tuple(range(student.num_heads)), map_heads(self.head_map, student.num_heads, teacher.num_heads)


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
