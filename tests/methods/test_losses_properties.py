"""What holds for every loss, or sets one apart from another."""

import math

import pytest
import torch
from torch import Tensor

from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL

LOSSES = [MSE(), MSE(center="row"), CE(), KL(), ReverseKL(), JS(), KL(temperature=4.0)]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def scores(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(*shape)).to(dtype)


def gradient(loss: AttentionLoss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(student, loss.target(teacher)).sum(), student)
    return result


@EVERY_LOSS
def test_a_student_that_is_the_teacher_has_nothing_to_learn(loss):
    teacher = scores(4, 3, 5, 5)
    value = loss(teacher, loss.target(teacher))

    p = teacher.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean(-1)
    expected = entropy if isinstance(loss, CE) else torch.zeros(4, 3, dtype=torch.float64)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert gradient(loss, teacher, teacher).abs().max() < 1e-12


@EVERY_LOSS
def test_any_other_student_has(loss):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)

    assert (loss(student, loss.target(teacher)) > loss(teacher, loss.target(teacher)) + 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ce_and_kl_are_one_loss_to_the_student(temperature):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    of_ce = gradient(CE(temperature=temperature), student, teacher)
    of_kl = gradient(KL(temperature=temperature), student, teacher)

    assert of_ce.abs().max() > 1e-3
    torch.testing.assert_close(of_ce, of_kl, atol=1e-12, rtol=0)


def test_the_real_contrasts_have_gradients_of_their_own():
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    directions = [gradient(kind(), student, teacher).flatten() for kind in (KL, ReverseKL, JS, MSE)]

    cosines = torch.corrcoef(torch.stack(directions))
    assert (cosines - torch.eye(4)).max() < 0.99


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != MSE()], ids=repr)
def test_a_shift_of_a_row_changes_nothing(loss):
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    value = loss(student, loss.target(teacher))

    shifted = loss(student + scores(4, 3, 5, 1), loss.target(teacher + scores(4, 3, 5, 1)))

    torch.testing.assert_close(shifted, value, atol=1e-12, rtol=0)


def test_plain_mse_does_see_a_shift():
    teacher = scores(4, 3, 5, 5)

    value = MSE()(teacher + 2, MSE().target(teacher))

    torch.testing.assert_close(value, torch.full((4, 3), 4.0, dtype=torch.float64))


def test_js_is_symmetric_and_at_most_log_2():
    student, teacher = scores(4, 3, 5, 5), scores(4, 3, 5, 5)
    torch.testing.assert_close(JS()(student, JS().target(teacher)), JS()(teacher, JS().target(student)))

    opposite = torch.eye(2)[None, None] * 100
    assert JS()(opposite, JS().target(-opposite)).item() == pytest.approx(math.log(2))


@EVERY_LOSS
def test_extreme_scores_stay_finite(loss):
    student, teacher = (1e4 * torch.randint(-1, 2, (4, 3, 5, 5)).float() for _ in range(2))

    assert loss(student, loss.target(teacher)).isfinite().all()
    assert gradient(loss, student, teacher).isfinite().all()


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_compared_in_float32(loss, dtype):
    student, teacher = scores(4, 3, 5, 5, dtype=dtype), scores(4, 3, 5, 5, dtype=dtype)

    value = loss(student, loss.target(teacher))

    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), loss.target(teacher.float())))


@EVERY_LOSS
def test_autocast_does_not_lower_the_precision(loss):
    student, teacher = scores(4, 3, 5, 5, dtype=torch.float32), scores(4, 3, 5, 5, dtype=torch.float32)
    expected = loss(student, loss.target(teacher))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, loss.target(teacher)), expected)


@EVERY_LOSS
@pytest.mark.parametrize("masked", [False, True])
def test_stacked_students_equal_separate_calls(loss, masked):
    student, target = scores(6, 4, 3, 5, 5), loss.target(scores(4, 3, 5, 5))
    allowed = ~torch.eye(5, dtype=torch.bool) if masked else None

    together = loss(student, target, allowed)

    assert together.shape == (6, 4, 3)
    for s in range(6):
        torch.testing.assert_close(together[s], loss(student[s], target, allowed), atol=1e-12, rtol=0)


@EVERY_LOSS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("students", [(), (2,)], ids=["one", "stacked"])
def test_an_image_has_the_value_that_it_has_alone(loss, masked, students):
    student, teacher = scores(*students, 4, 3, 5, 5), scores(4, 3, 5, 5)
    allowed = ~torch.eye(5, dtype=torch.bool) if masked else None

    together = loss(student, loss.target(teacher), allowed)

    for i in range(4):
        alone = loss(student.narrow(-4, i, 1), loss.target(teacher[i : i + 1]), allowed)
        assert alone.shape == (*students, 1, 3)
        torch.testing.assert_close(together[..., i : i + 1, :], alone, atol=1e-12, rtol=0)


@EVERY_LOSS
def test_averaging_one_target_is_that_target(loss):
    target = loss.target(scores(4, 3, 5, 5))

    torch.testing.assert_close(loss.average(torch.stack([target, target]), dim=0), target)
