"""What head, block and encoder choose, and which choices are refused."""

import pytest

from vitkd.errors import ConfigError
from vitkd.methods.maps.granularity import Block, BlockPair, Encoder, Granularity, Head
from vitkd.models import AttentionLayout


def layouts(*heads: int) -> list[AttentionLayout]:
    """Of blocks with so many heads each."""
    return [AttentionLayout(count, head_dim=4, grid=(2, 2), prefix=1, readers=(0,)) for count in heads]


STUDENT, TEACHER = layouts(2, 2, 2), layouts(4, 4, 4, 4, 4, 4)


def every_head(*blocks: tuple[int, int]) -> list[BlockPair]:
    """Both student heads of each (student block, teacher block), paired by index."""
    return [BlockPair(ours, theirs, (0, 1), ((0,), (1,))) for ours, theirs in blocks]


@pytest.mark.parametrize(
    ("granularity", "pairs"),
    [
        (Head(), [BlockPair(2, 5, (0,), ((0,),))]),
        (Head(blocks=[1], heads=[[0, 2]]), [BlockPair(1, 3, (0,), ((2,),))]),
        (Head(blocks=[0, 1], heads=[[1, 3], [0, 0]]),
         [BlockPair(0, 1, (1, 0), ((3,), (0,))), BlockPair(1, 3, (1, 0), ((3,), (0,)))]),
        (Head(heads=[[-1, -1]]), [BlockPair(2, 5, (1,), ((3,),))]),
        (Head(heads=[[0, 2], [1, 2]]), [BlockPair(2, 5, (0, 1), ((2,), (2,)))]),
        (Block(), every_head((2, 5))),
        (Block(blocks=[-3, -1]), every_head((0, 1), (2, 5))),
        (Block(blocks=[0], teacher_blocks=[-2]), every_head((0, 4))),
        (Block(head_map="group_mean"), [BlockPair(2, 5, (0, 1), ((0, 1), (2, 3)))]),
        (Encoder(), every_head((0, 1), (1, 3), (2, 5))),
        (Encoder(teacher_blocks=[0, 0, 2]), every_head((0, 0), (1, 0), (2, 2))),
    ],
    ids=repr,
)  # fmt: skip
def test_the_chosen_maps(granularity: Granularity, pairs: list[BlockPair]):
    assert granularity.pairs(STUDENT, TEACHER) == pairs


def test_a_student_deeper_than_its_teacher_learns_from_blocks_that_exist():
    pairs = Encoder().pairs(layouts(2, 2, 2, 2, 2), layouts(2, 2))

    assert {pair.teacher_block for pair in pairs} == {0, 1}


@pytest.mark.parametrize(
    ("granularity", "words"),
    [
        (Block(blocks=[3]), ["granularity.blocks", "the student has no block 3", "0 to 2"]),
        (Block(blocks=[-4]), ["granularity.blocks", "no block -4"]),
        (
            Block(blocks=[0], teacher_blocks=[6]),
            ["granularity.teacher_blocks", "the teacher has no block 6", "0 to 5"],
        ),
        (Block(blocks=[]), ["granularity.blocks=[]", "at least one"]),
        (Block(blocks=[1, 1]), ["granularity.blocks=[1, 1]", "once"]),
        (Block(blocks=[2, -1]), ["granularity.blocks=[2, -1]", "once"]),
        (Block(blocks=[0, 1], teacher_blocks=[1]), ["granularity.teacher_blocks=[1]", "each of the 2"]),
        (Encoder(teacher_blocks=[0, 1]), ["granularity.teacher_blocks=[0, 1]", "each of the 3"]),
        (Head(heads=[[2, 0]]), ["granularity.heads", "the student has no head 2"]),
        (Head(heads=[[0, 4]]), ["granularity.heads", "the teacher has no head 4", "0 to 3"]),
        (Head(heads=[[0, 1, 2]]), ["granularity.heads=[[0, 1, 2]]", "[[0,2]]"]),
        (Head(heads=[[0]]), ["granularity.heads=[[0]]"]),
        (Head(heads=[]), ["granularity.heads=[]"]),
        (Head(heads=[[0, 1], [0, 2]]), ["granularity.heads", "one teacher head"]),
        (Head(heads=[[1, 1], [-1, 2]]), ["granularity.heads", "one teacher head"]),
    ],
    ids=repr,
)
def test_impossible_choices_are_refused_in_one_line(granularity: Granularity, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        granularity.pairs(STUDENT, TEACHER)

    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("kind", [Block, Encoder])
def test_more_student_heads_than_teacher_heads_fit_only_head_granularity(kind):
    wide = layouts(6, 6, 6)
    with pytest.raises(ConfigError, match="granularity=head"):
        kind().pairs(wide, TEACHER)

    assert Head(heads=[[5, 3]]).pairs(wide, TEACHER) == [BlockPair(2, 5, (5,), ((3,),))]


def test_each_block_counts_its_own_heads():
    """Of models whose blocks have more heads the deeper they lie."""
    student, teacher = layouts(1, 2, 4), layouts(2, 4, 8)

    assert Encoder(head_map="group_mean").pairs(student, teacher) == [
        BlockPair(0, 0, (0,), ((0, 1),)),
        BlockPair(1, 1, (0, 1), ((0, 1), (2, 3))),
        BlockPair(2, 2, (0, 1, 2, 3), ((0, 1), (2, 3), (4, 5), (6, 7))),
    ]
    assert Head(blocks=[2], heads=[[3, 7]]).pairs(student, teacher) == [BlockPair(2, 2, (3,), ((7,),))]
    with pytest.raises(ConfigError, match="the student has no head 3, only 0 to 1"):
        Head(blocks=[1], heads=[[3, 0]]).pairs(student, teacher)
    with pytest.raises(ConfigError, match="granularity=head"):
        Block(teacher_blocks=[0]).pairs(student, teacher)


def test_an_unknown_head_map_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^head_map=nearest: [^\n]*index, group_mean, hungarian or squeeze"
    ):
        Block(head_map="nearest")
