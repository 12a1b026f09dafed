"""From scores per block to one value per image and student map, and to the transfer loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data import Batch
from vitkd.methods.maps.alignment import Alignment, token_interpolation
from vitkd.methods.maps.granularity import BlockPair
from vitkd.methods.maps.losses import CE, JS, KL, MASKED, MSE, ReverseKL
from vitkd.methods.maps.objective import AttentionObjective, take_heads
from vitkd.methods.maps.streaming import STREAM_ABOVE
from vitkd.models import Output, Taps
from vitkd.models.output import QKV

EVERY_LOSS = pytest.mark.parametrize("loss", [MSE(), CE(), KL(), ReverseKL(), JS()], ids=repr)
PAIRS = [BlockPair(0, 1, (0, 2), ((3,), (0,))), BlockPair(2, 5, (1,), ((2,),))]


def scores(blocks: list[int], *shape: int) -> dict[int, Tensor]:
    return {i: 2 * torch.randn(*shape, dtype=torch.float64) for i in blocks}


@EVERY_LOSS
def test_each_value_compares_one_student_map_with_its_teacher_map(loss):
    student, teacher = scores([0, 2], 4, 3, 5, 5), scores([1, 5], 4, 4, 5, 5)

    values = AttentionObjective(PAIRS, loss).compare(student, teacher)

    def alone(image: int, block: int, head: int, teacher_block: int, teacher_head: int) -> float:
        ours, theirs = student[block][[image]], teacher[teacher_block][[image]]
        return loss(ours[:, [head]], loss.target(theirs[:, [teacher_head]])).item()

    assert values.shape == (4, 3)
    for i in range(4):
        assert values[i].tolist() == pytest.approx(
            [alone(i, 0, 0, 1, 3), alone(i, 0, 2, 1, 0), alone(i, 2, 1, 5, 2)], abs=1e-12
        )


def test_names_and_blocks_follow_the_pairs():
    objective = AttentionObjective(PAIRS, MSE())

    assert objective.curves == ("map_loss/0.0", "map_loss/0.2", "map_loss/2.1")
    assert objective.student_taps == Taps(scores=(0, 2))
    assert objective.teacher_taps == Taps(scores=(1, 5), logits=False)


def test_beyond_the_limit_only_factors_are_asked_for():
    at_once, streams = (AttentionObjective(PAIRS, MSE(), tokens=STREAM_ABOVE + more) for more in (0, 1))

    assert not at_once.streams
    assert at_once.student_taps == Taps(scores=(0, 2))
    assert streams.streams
    assert streams.student_taps == Taps(factors=(0, 2))
    assert streams.teacher_taps == Taps(factors=(1, 5), logits=False)


@pytest.mark.parametrize("streams", [False, True])
def test_what_it_asked_for_is_what_it_compares(streams):
    student, teacher = (
        {i: QKV(*torch.randn(2, 4, heads, 5, 6, dtype=torch.float64)) for i in blocks}
        for heads, blocks in ((3, (0, 2)), (4, (1, 5)))
    )
    ours, theirs = ({i: qkv.scores() for i, qkv in blocks.items()} for blocks in (student, teacher))
    objective = AttentionObjective(PAIRS, KL(), tokens=STREAM_ABOVE + 1 if streams else 5)
    outputs = (
        (Output(qkv=student), Output(qkv=teacher))
        if streams
        else (Output(scores=ours), Output(scores=theirs))
    )
    batch = Batch(torch.empty(4, 3, 8, 8), torch.zeros(4).long(), torch.arange(4))

    terms = objective(batch, *outputs)

    assert terms.keys() == {"map_loss"}
    expected = AttentionObjective(PAIRS, KL()).compare(ours, theirs)
    torch.testing.assert_close(terms["map_loss"], expected, atol=1e-12, rtol=0)


def test_a_teacher_block_that_two_student_blocks_share_is_asked_for_once():
    pairs = [BlockPair(i, 1, (0,), ((0,),)) for i in range(3)]

    objective = AttentionObjective(pairs, MSE())

    assert objective.student_taps.scores == (0, 1, 2)
    assert objective.teacher_taps.scores == (1,)


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 3.0), ("sum", 9.0), ("sum_blocks", 7.5)])
def test_reduction_over_maps(reduction, expected):
    objective = AttentionObjective(PAIRS, MSE(reduction=reduction))
    values = torch.tensor([[1.0, 2.0, 6.0], [2.0, 4.0, 12.0]])

    def losses(values: Tensor) -> Tensor:
        return objective.transfer({"map_loss": values})

    assert losses(values).tolist() == pytest.approx([expected, 2 * expected])
    of_stack = losses(torch.stack([values, -values, 3 * values]))
    assert of_stack.shape == (3, 2)
    assert of_stack[1].tolist() == pytest.approx([-expected, -2 * expected])
    assert of_stack[2].tolist() == pytest.approx([3 * expected, 6 * expected])


def test_curves_are_the_means_over_images_without_gradient():
    objective = AttentionObjective(PAIRS, MSE())
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 2.0]], requires_grad=True)

    curves = objective.curve_values({"map_loss": values})
    of_stack = objective.curve_values({"map_loss": torch.stack([values, 2 * values])})

    assert curves.tolist() == [2.0, 1.0, 4.0]
    assert of_stack.tolist() == [[2.0, 1.0, 4.0], [4.0, 2.0, 8.0]]
    assert not curves.requires_grad


@EVERY_LOSS
def test_stacked_students_share_the_teacher(loss):
    student, teacher = scores([0, 2], 6, 4, 3, 5, 5), scores([1, 5], 4, 4, 5, 5)
    objective = AttentionObjective(PAIRS, loss)

    together = objective.compare(student, teacher)

    assert together.shape == (6, 4, 3)
    for s in range(6):
        alone = objective.compare({i: value[s] for i, value in student.items()}, teacher)
        torch.testing.assert_close(together[s], alone, atol=1e-12, rtol=0)


def test_a_mask_reaches_the_loss():
    student, teacher = scores([0], 4, 1, 5, 5), scores([0], 4, 1, 5, 5)
    allowed = ~torch.eye(5, dtype=torch.bool)
    pairs = [BlockPair(0, 0, (0,), ((0,),))]

    value = AttentionObjective(pairs, KL(), [Alignment(allowed=allowed)]).compare(student, teacher)

    by_itself = KL()(student[0], KL().target(teacher[0]), allowed)
    torch.testing.assert_close(value, by_itself, atol=1e-14, rtol=0)
    # To the last bit where the teacher, too, is masked before its softmax.
    masked = teacher[0].masked_fill(~allowed, MASKED)
    assert torch.equal(value, KL()(student[0], KL().target(masked), allowed))


GROUPED = [BlockPair(0, 0, (0, 1), ((0, 1, 2), (3, 4, 5)))]


def test_group_mean_averages_scores_for_mse():
    student, teacher = scores([0], 4, 2, 5, 5), scores([0], 4, 6, 5, 5)

    values = AttentionObjective(GROUPED, MSE()).compare(student, teacher)

    means = torch.stack([teacher[0][:, :3].mean(1), teacher[0][:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(values, (student[0] - means).square().mean((2, 3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_group_mean_averages_probabilities_for_distributions(temperature):
    student, teacher = scores([0], 4, 2, 5, 5), scores([0], 4, 6, 5, 5)

    of_ce, of_kl = (
        AttentionObjective(GROUPED, kind(temperature=temperature)).compare(student, teacher)
        for kind in (CE, KL)
    )

    p = (teacher[0] / temperature).softmax(-1).unflatten(1, (2, 3)).mean(2)
    log_q = (student[0] / temperature).log_softmax(-1)
    torch.testing.assert_close(of_ce, -(p * log_q).sum(-1).mean(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(of_kl, (p * (p.log() - log_q)).sum(-1).mean(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("heads", "is_view"),
    [([1], True), ([0, 1, 2, 3], True), ([1, 2], True), ([0, 2], False), ([2, 1], False)],
)
def test_take_heads(heads, is_view):
    whole = torch.randn(2, 4, 4, 3, 3)

    taken = take_heads(whole, heads)

    assert torch.equal(taken, whole[:, :, heads])
    assert (taken.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == is_view


def square(side: int) -> tuple[int, int]:
    return side, side


@pytest.mark.parametrize(
    ("from_grid", "to_grid"),
    [
        *((square(of), square(to)) for of, to in ((4, 2), (2, 4), (3, 5), (7, 4), (1, 3), (3, 1))),
        ((4, 2), (2, 2)),
        ((2, 3), (4, 5)),
    ],
)
def test_token_interpolation_keeps_cls_apart_and_sums_to_one(from_grid, to_grid):
    matrix = token_interpolation(from_grid, to_grid)

    patches = math.prod(to_grid)
    assert matrix.shape == (1 + patches, 1 + math.prod(from_grid))
    torch.testing.assert_close(matrix.sum(1), torch.ones(1 + patches))
    assert matrix[0].tolist() == [1.0] + [0.0] * math.prod(from_grid)
    assert not matrix[1:, 0].any()


def test_token_interpolation_between_equal_grids_is_the_identity():
    torch.testing.assert_close(token_interpolation((4, 4), (4, 4)), torch.eye(17))
    torch.testing.assert_close(token_interpolation((2, 3), (2, 3)), torch.eye(7))


@pytest.mark.parametrize(
    ("from_grid", "to_grid"),
    [
        *((square(of), square(to)) for of, to in ((4, 2), (2, 4), (3, 5))),
        ((4, 2), (2, 3)),
        ((2, 5), (6, 3)),
    ],
)
def test_token_interpolation_is_bilinear_over_the_image_plane(from_grid, to_grid):
    features = torch.randn(2, math.prod(from_grid), 6)  # any values that tokens may carry
    plane = features.mT.unflatten(-1, from_grid)

    resized = token_interpolation(from_grid, to_grid)[1:, 1:] @ features

    expected = F.interpolate(plane, size=to_grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, expected.flatten(-2).mT)


@pytest.mark.parametrize("kind", [CE, KL, ReverseKL, JS])
@pytest.mark.parametrize("grids", [(4, 2), (2, 3)])
def test_resized_targets_are_still_distributions(kind, grids):
    loss, matrix = kind(), token_interpolation(*map(square, grids)).double()
    teacher = 5 * torch.randn(3, 2, 1 + grids[0] ** 2, 1 + grids[0] ** 2, dtype=torch.float64)

    target = loss.resize(loss.target(teacher), matrix)

    assert target.shape[-2:] == (1 + grids[1] ** 2,) * 2
    torch.testing.assert_close(target.exp().sum(-1), torch.ones_like(target[..., 0]))


def pool_queries_and_keys(p):
    """4×4 patches as 2×2: four queries become their mean, four keys the sum of their weights; CLS stays."""
    keys = F.avg_pool2d(p[..., 1:].reshape(-1, 1, 4, 4), 2, divisor_override=1).reshape(*p.shape[:-1], 4)
    p = torch.cat([p[..., :1], keys], dim=-1).mT
    queries = F.avg_pool2d(p[..., 1:].reshape(-1, 1, 4, 4), 2).reshape(*p.shape[:-1], 4)
    return torch.cat([p[..., :1], queries], dim=-1).mT


def test_resized_transfer_equals_comparing_with_a_resized_teacher():
    student, teacher = scores([0], 4, 1, 5, 5), scores([0], 4, 1, 17, 17)
    matrix, pairs = token_interpolation((4, 4), (2, 2)).double(), [BlockPair(0, 0, (0,), ((0,),))]

    of_mse, of_kl = (
        AttentionObjective(pairs, loss, [Alignment(matrix)]).compare(student, teacher)
        for loss in (MSE(), KL())
    )

    resized = matrix @ teacher[0] @ matrix.mT
    p = pool_queries_and_keys(teacher[0].softmax(-1))
    assert of_mse.shape == of_kl.shape == (4, 1)
    for i in range(4):
        mse = F.mse_loss(student[0][i], resized[i])
        assert of_mse[i].item() == pytest.approx(mse.item(), abs=1e-12)
        kl = F.kl_div(student[0][i].log_softmax(-1), p[i], reduction="sum") / 5
        assert of_kl[i].item() == pytest.approx(kl.item(), abs=1e-12)


@EVERY_LOSS
def test_resizing_extreme_scores_stays_finite(loss):
    student = (1e4 * torch.randint(-1, 2, (4, 1, 5, 5)).float()).requires_grad_()
    teacher = 1e4 * torch.randint(-1, 2, (4, 1, 17, 17)).float()

    value = loss(student, loss.resize(loss.target(teacher), token_interpolation((4, 4), (2, 2))))
    value.sum().backward()

    assert value.shape == (4, 1)
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@EVERY_LOSS
def test_resizing_under_autocast_keeps_float32(loss):
    student, teacher = {0: torch.randn(4, 1, 5, 5)}, {0: torch.randn(4, 1, 17, 17)}
    resize = Alignment(token_interpolation((4, 4), (2, 2)))
    objective = AttentionObjective([BlockPair(0, 0, (0,), ((0,),))], loss, [resize])
    expected = objective.compare(student, teacher)

    with torch.autocast("cpu", torch.bfloat16):
        value = objective.compare(student, teacher)

    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
