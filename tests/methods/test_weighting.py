"""`weighting=`: values worked out by hand, and what each weighting makes of a whole training."""

import math
from typing import Any

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.methods.weighting import (
    WSLD,
    Confidence,
    Constant,
    Cosine,
    GradientBalance,
    Linear,
    Step,
    StudentCorrect,
    TeacherCorrect,
    Weighting,
)

LOG2, LOG3, HALF = math.log(2), math.log(3), math.sqrt(0.5)
LABEL = torch.tensor([0, 0, 1])
# Probabilities of class 0: 3/4, 1/4, 1/4; so the second image is wrong.
STUDENT = torch.tensor([[LOG3, 0], [0, LOG3], [0, LOG3]], dtype=torch.float64)
# 1/2 (a tie, which goes to class 0), 3/4, 3/4; so the third image is wrong.
TEACHER = torch.tensor([[0, 0], [LOG3, 0], [LOG3, 0]], dtype=torch.float64)


def of_images(weighting: Weighting) -> list[float]:
    weight = weighting.image_weight(LABEL, STUDENT, TEACHER)
    assert weight is not None
    return weight.tolist()


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Constant(), [0.4] * 5),
        (Linear(), [0.4, 0.55, 0.7, 0.85, 1.0]),
        (Linear(end=0.0), [0.4, 0.3, 0.2, 0.1, 0.0]),
        (
            Cosine(),
            [0.4, 0.4 + 0.6 * (1 - math.sqrt(0.5)) / 2, 0.7, 0.4 + 0.6 * (1 + math.sqrt(0.5)) / 2, 1.0],
        ),
        (Step(), [0.4, 0.4, 0.4, 1.0, 1.0]),
        (Step(end=0.0, at=0.8), [0.4, 0.4, 0.4, 0.4, 0.0]),
        (StudentCorrect(), [0.4] * 5),
        (GradientBalance(), [0.4] * 5),
    ],
    ids=str,
)
def test_the_class_weight_of_five_epochs(weighting, expected):
    weights = [weighting.class_weight(0.4, epoch, 5) for epoch in range(5)]

    assert weights == pytest.approx(expected, abs=1e-12)
    # The ends are exact: at 1 the teacher is not asked.
    assert (weights[0], weights[-1]) == (0.4, expected[-1])


@pytest.mark.parametrize("weighting", [Linear(), Cosine(), Step(), Step(at=0.1)], ids=str)
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_the_first_epoch_has_the_first_weight(weighting, epochs):
    assert weighting.class_weight(0.3, 0, epochs) == 0.3


@pytest.mark.parametrize(
    ("weighting", "alpha", "expected"),
    [
        (Constant(), 1.0, False),
        (Constant(), 0.9, True),
        (WSLD(), 1.0, False),
        (Linear(), 1.0, False),
        (Linear(end=0.5), 1.0, True),
        (Step(end=1.0), 0.0, True),
    ],
)
def test_it_says_whether_there_is_anything_to_learn_from_a_teacher(weighting, alpha, expected):
    assert weighting.distils(alpha) is expected


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (StudentCorrect(), [1, 0.5, 1]),
        (StudentCorrect(factor=0.0), [1, 0, 1]),
        (StudentCorrect(factor=3.0), [1, 3, 1]),
        (TeacherCorrect(), [1, 1, 0]),
        (Confidence(), [1 / 2, 3 / 4, 1 / 4]),
        # 1 − exp(−CE_s/CE_t): CE_s is log(4/3), log 4, log(4/3); CE_t is log 2, log(4/3), log 4.
        (
            WSLD(),
            [
                1 - math.exp(-math.log(4 / 3) / LOG2),
                1 - math.exp(-math.log(4) / math.log(4 / 3)),
                1 - math.exp(-math.log(4 / 3) / math.log(4)),
            ],
        ),
    ],
    ids=str,
)
def test_the_weight_of_each_image(weighting, expected):
    assert of_images(weighting) == pytest.approx(expected, abs=1e-12)


def test_wsld_points_the_other_way_than_the_reports_proposal():
    """The student has the second image wrong: the report takes weight away there, WSLD adds some."""
    wsld, report = of_images(WSLD()), of_images(StudentCorrect())

    assert wsld[1] > wsld[0]
    assert report[1] < report[0]


def test_wsld_of_a_teacher_that_is_certain_is_finite():
    certain = torch.tensor([[1000.0, 0.0]])
    weight = WSLD().image_weight(torch.tensor([0]), torch.tensor([[0.0, 0.0]]), certain)

    assert weight is not None
    assert weight.tolist() == [1.0]


@pytest.mark.parametrize("weighting", [StudentCorrect(), TeacherCorrect(), Confidence(), WSLD()], ids=str)
def test_students_of_a_stack_are_weighed_each_by_itself(weighting):
    students = torch.randn(4, 3, 2, dtype=torch.float64)
    apart = [weighting.image_weight(LABEL, student, TEACHER) for student in students]

    # All see the same images, or each its own.
    shared = weighting.image_weight(LABEL, students, TEACHER)
    own = weighting.image_weight(LABEL.expand(4, 3), students, TEACHER.expand(4, 3, 2))

    for together in (shared, own):
        assert together.shape == (4, 3)
        torch.testing.assert_close(together, torch.stack(apart), atol=1e-12, rtol=0)


def test_gradients_are_balanced():
    """w = g_t/(g_t + r·g_c): then (1 − w)·g_t = r·w·g_c."""
    of_class, of_transfer = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    weight = GradientBalance(ratio=2.0).balanced(of_class, of_transfer)

    assert weight.tolist() == pytest.approx([3 / 5, 1 / 5])
    torch.testing.assert_close((1 - weight) * of_transfer, 2 * weight * of_class)


@pytest.mark.parametrize("norms", [(0, 0), (0, 1), (1, 0), (math.inf, 1), (1, math.inf), (math.nan, 1)])
def test_a_gradient_that_is_0_or_not_finite_leaves_the_weight_as_it_is(norms):
    of_class, of_transfer = torch.tensor(norms, dtype=torch.float32).unsqueeze(-1)

    assert GradientBalance().balanced(of_class, of_transfer).isnan().all()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Linear, {"end": 1.5}),
        (Cosine, {"end": -0.1}),
        (Step, {"at": 0.0}),
        (Step, {"at": 1.0}),
        (StudentCorrect, {"factor": -1.0}),
        (StudentCorrect, {"factor": math.inf}),
        (GradientBalance, {"ratio": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, float]):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name}={value}: must"):
        kind(**settings)
