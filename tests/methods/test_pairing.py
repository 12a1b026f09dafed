"""Which teacher block and heads a student map learns from."""

from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.attention import match_heads
from vitkd.methods.maps.alignment import Alignment, token_interpolation
from vitkd.methods.maps.granularity import BlockPair, map_block, map_heads
from vitkd.methods.maps.losses import CE, JS, KL, MSE


@pytest.mark.parametrize(
    ("student_depth", "teacher_depth", "teacher_blocks"),
    [
        (5, 10, [1, 3, 5, 7, 9]),
        (6, 13, [1, 3, 5, 7, 9, 12]),
        (4, 4, [0, 1, 2, 3]),
        (3, 10, [2, 5, 9]),
        (5, 6, [0, 1, 2, 3, 5]),
        (1, 7, [6]),
    ],
)
def test_blocks_are_mapped_by_depth(student_depth, teacher_depth, teacher_blocks):
    assert [map_block(i, student_depth, teacher_depth) for i in range(student_depth)] == teacher_blocks


def test_every_student_block_has_a_teacher_block_in_order_the_last_the_last():
    for student_depth, teacher_depth in product(range(1, 9), repeat=2):
        mapped = [map_block(i, student_depth, teacher_depth) for i in range(student_depth)]
        assert mapped == sorted(mapped), (student_depth, teacher_depth)
        assert mapped[0] >= 0, (student_depth, teacher_depth)
        assert mapped[-1] == teacher_depth - 1, (student_depth, teacher_depth)


def test_head_maps():
    assert map_heads("index", 2, 4) == ((0,), (1,))
    assert map_heads("index", 4, 4) == ((0,), (1,), (2,), (3,))
    assert map_heads("group_mean", 2, 4) == ((0, 1), (2, 3))
    assert map_heads("group_mean", 2, 6) == ((0, 1, 2), (3, 4, 5))
    assert map_heads("group_mean", 3, 3) == ((0,), (1,), (2,))


@pytest.mark.parametrize("head_map", ["index", "group_mean", "hungarian", "squeeze"])
def test_more_student_than_teacher_heads_are_refused(head_map):
    with pytest.raises(ConfigError, match=r"^student\.num_heads=5 [^\n]*teacher\.num_heads=4[^\n]*$"):
        map_heads(head_map, 5, 4)


def test_uneven_groups_are_refused():
    with pytest.raises(ConfigError, match=r"^granularity\.head_map=group_mean [^\n]*=8 [^\n]*=3: [^\n]+$"):
        map_heads("group_mean", 3, 8)


def start(student_heads: int) -> BlockPair:
    return BlockPair(0, 2, tuple(range(student_heads)), map_heads("hungarian", student_heads, 4))


def scores(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("loss", [MSE(), CE(), KL(), JS()], ids=repr)
def test_hungarian_recovers_a_permutation(loss):
    teacher, order = scores(6, 4, 5, 5), [2, 0, 3, 1]
    student = teacher[:, order] + 0.1 * scores(6, 4, 5, 5)

    (pair,) = match_heads([start(4)], {0: student}, {2: teacher}, loss)

    assert pair == BlockPair(0, 2, (0, 1, 2, 3), ((2,), (0,), (3,), (1,)))


def test_hungarian_recovers_which_teacher_heads_fewer_student_heads_took():
    teacher = scores(6, 4, 5, 5)

    (pair,) = match_heads([start(2)], {0: teacher[:, [3, 1]]}, {2: teacher}, KL())

    assert pair.teacher_heads == ((3,), (1,))


@pytest.mark.parametrize("student_heads", [3, 4])
def test_hungarian_has_the_least_total_of_all_assignments(student_heads):
    """Against all permutations, on scores that have nothing in common."""
    for _ in range(5):
        student, teacher, loss = scores(3, student_heads, 5, 5), scores(3, 4, 5, 5), KL()

        (pair,) = match_heads([start(student_heads)], {0: student}, {2: teacher}, loss)

        def total(heads: tuple[int, ...], student=student, teacher=teacher, loss=loss) -> float:
            return loss(student, loss.target(teacher[:, list(heads)])).sum().item()

        found = tuple(head for (head,) in pair.teacher_heads)
        assert found == min(permutations(range(4), student_heads), key=total)


def test_hungarian_settles_each_block_by_itself():
    teacher = {1: scores(6, 4, 5, 5), 3: scores(6, 4, 5, 5)}
    student = {0: teacher[1][:, [1, 0]], 1: teacher[3][:, [3, 2]]}
    pairs = [BlockPair(i, t, (0, 1), ((0,), (1,))) for i, t in ((0, 1), (1, 3))]

    matched = match_heads(pairs, student, teacher, MSE())

    assert [pair.teacher_heads for pair in matched] == [((1,), (0,)), ((3,), (2,))]
    assert [(pair.student_block, pair.teacher_block) for pair in matched] == [(0, 1), (1, 3)]


def test_hungarian_compares_on_the_students_grid():
    matrix = token_interpolation((4, 4), (2, 2)).double()
    teacher, order = scores(6, 4, 17, 17), [1, 3, 0, 2]
    student = (matrix @ teacher @ matrix.mT)[:, order]

    (pair,) = match_heads([start(4)], {0: student}, {2: teacher}, MSE(), [Alignment(matrix)])

    assert pair.teacher_heads == ((1,), (3,), (0,), (2,))


def test_maps_are_named_by_block_and_head():
    assert BlockPair(3, 7, (0, 2), ((1,), (0,))).names == ["3.0", "3.2"]
