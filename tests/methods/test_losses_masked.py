"""Entries that a model masks stay out of every mean, whatever stands there."""

import pytest
import torch
from torch import Tensor

from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL

LOSSES = [MSE(), MSE(center="row"), CE(), KL(), ReverseKL(), JS(), KL(temperature=0.5)]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=repr)
NO_DIAGONAL = ~torch.eye(5, dtype=torch.bool)


def scores(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


def compare(loss: AttentionLoss, student: Tensor, teacher: Tensor, allowed: Tensor | None = None) -> Tensor:
    return loss(student, loss.target(teacher), allowed)


@EVERY_LOSS
def test_masked_columns_are_as_if_cut_out(loss):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    allowed = torch.tensor([True, False, True, True, False]).expand(5, 5)

    value = compare(loss, student, teacher, allowed)

    cut_out = compare(loss, student[..., allowed[0]], teacher[..., allowed[0]])
    torch.testing.assert_close(value, cut_out, atol=1e-12, rtol=0)


@EVERY_LOSS
def test_a_masked_diagonal_is_as_if_cut_out(loss):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)

    value = compare(loss, student, teacher, NO_DIAGONAL)

    cut_out = compare(
        loss, student[..., NO_DIAGONAL].unflatten(-1, (5, 4)), teacher[..., NO_DIAGONAL].unflatten(-1, (5, 4))
    )
    torch.testing.assert_close(value, cut_out, atol=1e-12, rtol=0)


def test_mse_counts_entries_not_rows():
    """Row 0 keeps one entry and row 1 both: the mean is over three, by hand."""
    student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 9.0], [2.0, 3.0]])[None, None]
    allowed = torch.tensor([[True, False], [True, True]])

    assert compare(MSE(), student, teacher, allowed).item() == pytest.approx((1 + 4 + 9) / 3)
    centred = (0 + (2 - 2.5) ** 2 + (3 - 2.5) ** 2) / 3
    assert compare(MSE(center="row"), student, teacher, allowed).item() == pytest.approx(centred)


@EVERY_LOSS
def test_masked_entries_get_no_gradient_and_the_others_do(loss):
    student, teacher = scores(4, 3, 5, 5).requires_grad_(), scores(4, 3, 5, 5)

    compare(loss, student, teacher, NO_DIAGONAL).sum().backward()

    assert (student.grad[..., ~NO_DIAGONAL] == 0).all()
    assert (student.grad[..., NO_DIAGONAL] != 0).all()


@EVERY_LOSS
def test_nothing_masked_is_no_mask(loss):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)

    everything = compare(loss, student, teacher, torch.ones(5, 5, dtype=torch.bool))

    torch.testing.assert_close(everything, compare(loss, student, teacher), atol=1e-12, rtol=0)


@EVERY_LOSS
@pytest.mark.parametrize("offset", [-2e4, -1e4, 1e4])
def test_a_mask_holds_for_extreme_scores(loss, offset):
    """However low the allowed scores lie, a masked one never outweighs them."""
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    masked = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~NO_DIAGONAL, 3e4)
    expected = compare(loss, student, teacher, NO_DIAGONAL)

    value = compare(loss, student + offset + masked, teacher + offset + masked, NO_DIAGONAL)

    torch.testing.assert_close(value, expected, atol=1e-7, rtol=0)
