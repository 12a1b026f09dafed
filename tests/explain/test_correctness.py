"""Fidelity and correctness: scipy's coefficient, scikit-learn's AUC, and what has none."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import pointbiserialr
from sklearn.metrics import roc_auc_score

from vitkd.explain.gallery.files import as_json
from vitkd.explain.measures.correctness import correctness_correlation


def images(count=300, effect=0.6, seed=0):
    """Figures that are higher by `effect` standard deviations where the student is right."""
    random = np.random.default_rng(seed)
    right = random.random(count) < 0.7
    return random.normal(size=count) + effect * right, right


@pytest.mark.parametrize("effect", [0.0, 0.3, -2.0])
def test_coefficient_and_p_are_scipys(effect):
    values, right = images(effect=effect)
    expected = pointbiserialr(right, values)
    got = correctness_correlation(values, right)
    assert got.r == pytest.approx(expected.statistic)
    assert got.p == pytest.approx(expected.pvalue, rel=1e-8)
    assert got.n == 300
    assert got.reason == ""


def test_auc_is_sklearns_with_ties():
    values, right = images()
    for each in (values, values.round()):
        assert correctness_correlation(each, right).auc == pytest.approx(roc_auc_score(right, each))


def test_by_hand():
    # Means 3.5 and 1.5 of right and wrong, standard deviation √1.25: r = 2·√(½·½) / √1.25.
    got = correctness_correlation([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert got.r == pytest.approx(1 / math.sqrt(1.25))
    # Of Student's t with two degrees of freedom, P(|T| > t) = 1 − t / √(2 + t²), and t² = 2·r² / (1 − r²).
    assert got.p == pytest.approx(1 - got.r)
    assert got.auc == 1


def test_a_perfect_coefficient():
    got = correctness_correlation([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    assert got.r == pytest.approx(1)
    assert got.p == pytest.approx(0, abs=1e-6)
    assert got.interval[1] == pytest.approx(1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # r of a metric shifted by d where right, with share p right: d·√(p(1−p)) / √(1 + d²·p(1−p)).
    spread = 0.6 * math.sqrt(0.7 * 0.3)
    truth = spread / math.sqrt(1 + spread**2)
    intervals = [correctness_correlation(*images(seed=s), resamples=300).interval for s in range(200)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.9 <= covered <= 0.99


def test_the_interval_is_as_wide_as_fishers():
    values, right = images(count=2000)
    got = correctness_correlation(values, right)
    z = math.atanh(got.r)
    expected = [math.tanh(z + side * 1.96 / math.sqrt(2000 - 3)) for side in (-1, 1)]
    assert got.interval == pytest.approx(expected, abs=0.01)
    assert got.interval[0] < got.r < got.interval[1]


def test_the_seed_decides_the_interval():
    values, right = images()
    assert correctness_correlation(values, right) == correctness_correlation(values, right)
    assert (
        correctness_correlation(values, right, seed=1).interval
        != correctness_correlation(values, right).interval
    )


def test_shift_and_scale_of_the_metric_change_nothing():
    values, right = images()
    expected = correctness_correlation(values, right)
    got = correctness_correlation(1e6 + 1e-3 * values, right)
    assert [got.r, got.p, got.auc, *got.interval] == pytest.approx(
        [expected.r, expected.p, expected.auc, *expected.interval], rel=1e-4
    )


def test_only_some_images():
    values, right = images()
    teacher_right = np.random.default_rng(1).random(300) < 0.5
    assert correctness_correlation(values, right, among=teacher_right) == correctness_correlation(
        values[teacher_right], right[teacher_right]
    )
    # What may confound: both follow the teacher, and among the images it has right nothing is left.
    easy = np.arange(400) % 2 == 0
    noise = np.random.default_rng(2)
    follows = easy + 0.1 * noise.normal(size=400)
    student = np.where(easy, noise.random(400) < 0.9, noise.random(400) < 0.2)
    assert correctness_correlation(follows, student).r > 0.5
    assert correctness_correlation(follows, student, among=easy).p > 0.05


def test_images_without_a_value_are_left_out():
    values, right = images()
    missing = values.copy()
    missing[:20] = math.nan
    assert correctness_correlation(missing, right) == correctness_correlation(values[20:], right[20:])


def test_tensors_are_taken():
    values, right = images()
    got = correctness_correlation(torch.tensor(values, requires_grad=True), torch.tensor(right))
    assert got == correctness_correlation(values, right)


@pytest.mark.parametrize(
    ("values", "right", "reason"),
    [
        ([1.0, 2.0, 3.0], [True] * 3, "the student is right on all 3 images"),
        ([1.0, 2.0, 3.0], [False] * 3, "the student is wrong on all 3 images"),
        ([0.1] * 7, [True, False] * 3 + [True], "the metric is 0.1 on all 7 images"),
        ([1.0, math.nan, 2.0], [True, False, False], "2 images with a value: a correlation takes 3"),
        ([], [], "0 images with a value"),
    ],
)
def test_what_has_no_correlation_says_why(values, right, reason):
    got = correctness_correlation(values, right)
    assert math.isnan(got.r)
    assert math.isnan(got.p)
    assert all(math.isnan(end) for end in got.interval)
    assert got.reason.startswith(reason)
    plain = json.loads(as_json(got))
    assert plain["r"] is None
    assert plain["interval"] == [None, None]
    assert plain["reason"] == got.reason


def test_equal_values_rank_no_better_than_chance():
    assert correctness_correlation([0.1] * 4, [True, False, True, False]).auc == 0.5
    assert math.isnan(correctness_correlation([1.0, 2.0, 3.0], [True] * 3).auc)


def test_a_single_wrong_image_still_has_an_interval():
    """Resamples without it have no r and do not count."""
    got = correctness_correlation([0.1, 0.9, 0.8, 0.7, 0.9], [False, True, True, True, True])
    assert got.r > 0.9
    assert all(-1 <= end <= 1 for end in got.interval)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="not equally many images"):
        correctness_correlation([1.0, 2.0], [True])
