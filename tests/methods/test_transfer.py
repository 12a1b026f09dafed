"""From scores per block to one value per student map, and to the transfer loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.methods.maps.alignment import Alignment
from vitkd.methods.maps.losses import CE, JS, KL, MSE, ReverseKL
from vitkd.methods.maps.objective import AttentionTransfer, take_heads
from vitkd.methods.maps.pairing import BlockPair
from vitkd.models.tokens import token_interpolation

EVERY_LOSS = pytest.mark.parametrize("loss", [MSE(), CE(), KL(), ReverseKL(), JS()], ids=repr)
PAIRS = [BlockPair(0, 1, (0, 2), ((3,), (0,))), BlockPair(2, 5, (1,), ((2,),))]


def scores(blocks: list[int], *shape: int) -> dict[int, Tensor]:
    return {i: 2 * torch.randn(*shape, dtype=torch.float64) for i in blocks}


@EVERY_LOSS
def test_each_value_compares_one_student_map_with_its_teacher_map(loss):
    student, teacher = scores([0, 2], 4, 3, 5, 5), scores([1, 5], 4, 4, 5, 5)

    values = AttentionTransfer(PAIRS, loss)(student, teacher)

    def alone(block: int, head: int, teacher_block: int, teacher_head: int) -> float:
        ours, theirs = student[block][:, [head]], teacher[teacher_block][:, [teacher_head]]
        return loss(ours, loss.target(theirs)).item()

    assert values.tolist() == pytest.approx(
        [alone(0, 0, 1, 3), alone(0, 2, 1, 0), alone(2, 1, 5, 2)], abs=1e-12
    )


def test_names_and_blocks_follow_the_pairs():
    transfer = AttentionTransfer(PAIRS, MSE())

    assert transfer.names == ["0.0", "0.2", "2.1"]
    assert transfer.student_blocks == [0, 2]
    assert transfer.teacher_blocks == [1, 5]


def test_a_teacher_block_that_two_student_blocks_share_is_asked_for_once():
    pairs = [BlockPair(i, 1, (0,), ((0,),)) for i in range(3)]

    assert AttentionTransfer(pairs, MSE()).teacher_blocks == [1]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 3.0), ("sum", 9.0)])
def test_reduction_over_maps(reduction, expected):
    transfer = AttentionTransfer(PAIRS, MSE(reduction=reduction))
    values = torch.tensor([1.0, 2.0, 6.0])

    assert transfer.total(values).item() == pytest.approx(expected)
    assert transfer.total(torch.stack([values, 2 * values])).tolist() == pytest.approx(
        [expected, 2 * expected]
    )


@EVERY_LOSS
def test_stacked_students_share_the_teacher(loss):
    student, teacher = scores([0, 2], 6, 4, 3, 5, 5), scores([1, 5], 4, 4, 5, 5)
    transfer = AttentionTransfer(PAIRS, loss)

    together = transfer(student, teacher)

    assert together.shape == (6, 3)
    for s in range(6):
        alone = transfer({i: value[s] for i, value in student.items()}, teacher)
        torch.testing.assert_close(together[s], alone, atol=1e-12, rtol=0)


def test_a_mask_reaches_the_loss():
    student, teacher = scores([0], 4, 1, 5, 5), scores([0], 4, 1, 5, 5)
    allowed = ~torch.eye(5, dtype=torch.bool)
    pairs = [BlockPair(0, 0, (0,), ((0,),))]

    value = AttentionTransfer(pairs, KL(), Alignment(allowed=allowed))(student, teacher)

    assert torch.equal(value, KL()(student[0], KL().target(teacher[0]), allowed))


GROUPED = [BlockPair(0, 0, (0, 1), ((0, 1, 2), (3, 4, 5)))]


def test_group_mean_averages_scores_for_mse():
    student, teacher = scores([0], 4, 2, 5, 5), scores([0], 4, 6, 5, 5)

    values = AttentionTransfer(GROUPED, MSE())(student, teacher)

    means = torch.stack([teacher[0][:, :3].mean(1), teacher[0][:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(values, (student[0] - means).square().mean((0, 2, 3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_group_mean_averages_probabilities_for_distributions(temperature):
    student, teacher = scores([0], 4, 2, 5, 5), scores([0], 4, 6, 5, 5)

    of_ce, of_kl = (
        AttentionTransfer(GROUPED, kind(temperature=temperature))(student, teacher) for kind in (CE, KL)
    )

    p = (teacher[0] / temperature).softmax(-1).unflatten(1, (2, 3)).mean(2)
    log_q = (student[0] / temperature).log_softmax(-1)
    torch.testing.assert_close(of_ce, -(p * log_q).sum(-1).mean((0, 2)), atol=1e-12, rtol=0)
    torch.testing.assert_close(of_kl, (p * (p.log() - log_q)).sum(-1).mean((0, 2)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("heads", "is_view"),
    [([1], True), ([0, 1, 2, 3], True), ([1, 2], True), ([0, 2], False), ([2, 1], False)],
)
def test_take_heads(heads, is_view):
    whole = torch.randn(2, 4, 4, 3, 3)

    taken = take_heads(whole, heads)

    assert torch.equal(taken, whole[:, :, heads])
    assert (taken.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == is_view


@pytest.mark.parametrize(("from_grid", "to_grid"), [(4, 2), (2, 4), (3, 5), (7, 4), (1, 3), (3, 1)])
def test_token_interpolation_keeps_cls_apart_and_sums_to_one(from_grid, to_grid):
    matrix = token_interpolation(from_grid, to_grid)

    assert matrix.shape == (1 + to_grid**2, 1 + from_grid**2)
    torch.testing.assert_close(matrix.sum(1), torch.ones(1 + to_grid**2))
    assert matrix[0].tolist() == [1.0] + [0.0] * from_grid**2
    assert not matrix[1:, 0].any()


def test_token_interpolation_between_equal_grids_is_the_identity():
    torch.testing.assert_close(token_interpolation(4, 4), torch.eye(17))


@pytest.mark.parametrize(("from_grid", "to_grid"), [(4, 2), (2, 4), (3, 5)])
def test_token_interpolation_is_bilinear_over_the_image_plane(from_grid, to_grid):
    features = torch.randn(2, from_grid**2, 6)  # any values that tokens may carry
    plane = features.mT.unflatten(-1, (from_grid, from_grid))

    resized = token_interpolation(from_grid, to_grid)[1:, 1:] @ features

    expected = F.interpolate(plane, size=(to_grid, to_grid), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, expected.flatten(-2).mT)


@pytest.mark.parametrize("kind", [CE, KL, ReverseKL, JS])
@pytest.mark.parametrize("grids", [(4, 2), (2, 3)])
def test_resized_targets_are_still_distributions(kind, grids):
    loss, matrix = kind(), token_interpolation(*grids).double()
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
    matrix, pairs = token_interpolation(4, 2).double(), [BlockPair(0, 0, (0,), ((0,),))]

    of_mse, of_kl = (
        AttentionTransfer(pairs, loss, Alignment(matrix))(student, teacher) for loss in (MSE(), KL())
    )

    resized = matrix @ teacher[0] @ matrix.mT
    assert of_mse.item() == pytest.approx(F.mse_loss(student[0], resized).item(), abs=1e-12)
    p = pool_queries_and_keys(teacher[0].softmax(-1))
    kl = F.kl_div(student[0].log_softmax(-1), p, reduction="sum") / (4 * 5)
    assert of_kl.item() == pytest.approx(kl.item(), abs=1e-12)


@EVERY_LOSS
def test_resizing_extreme_scores_stays_finite(loss):
    student = (1e4 * torch.randint(-1, 2, (4, 1, 5, 5)).float()).requires_grad_()
    teacher = 1e4 * torch.randint(-1, 2, (4, 1, 17, 17)).float()

    value = loss(student, loss.resize(loss.target(teacher), token_interpolation(4, 2)))
    value.sum().backward()

    assert math.isfinite(value.item())
    assert student.grad.isfinite().all()


@EVERY_LOSS
def test_resizing_under_autocast_keeps_float32(loss):
    student, teacher = {0: torch.randn(4, 1, 5, 5)}, {0: torch.randn(4, 1, 17, 17)}
    transfer = AttentionTransfer([BlockPair(0, 0, (0,), ((0,),))], loss, Alignment(token_interpolation(4, 2)))
    expected = transfer(student, teacher)

    with torch.autocast("cpu", torch.bfloat16):
        value = transfer(student, teacher)

    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
