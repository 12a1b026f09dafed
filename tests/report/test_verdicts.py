"""The verdict on an arm: what it says, and what it must not say."""

import numpy as np
import pytest

from vitkd.report.formatting import mean_interval, p_text, signed
from vitkd.report.statistics import Gain, paired_gain
from vitkd.report.verdicts import Outcome, Spread, judge


def gain_of(*differences: float) -> Gain:
    return paired_gain(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))


def test_a_real_gain_is_called_one():
    verdict = judge(gain_of(0.8, 1.0, 1.2, 1.4, 1.6), 0.01, Spread(0.3, "own"))

    assert verdict == (Outcome.REAL, "real gain")


def test_harm_is_called_harm():
    verdict = judge(gain_of(-0.8, -1.0, -1.2, -1.4, -1.6), 0.01, Spread(0.3, "own"))

    assert verdict == (Outcome.HURTS, "hurts")


def test_no_evidence_says_how_many_seeds_are_needed():
    # A gap of half a standard deviation takes 34 seeds.
    verdict = judge(gain_of(-1.0, 0.5, 2.0), 0.7, Spread(1.0, "own"))

    assert verdict.outcome == Outcome.NO_EVIDENCE
    assert verdict.text == "no evidence; this gap needs 34 seeds"


def test_an_uncorrected_p_makes_no_winner():
    gain = gain_of(0.8, 1.0, 1.2, 1.4, 1.6)
    assert gain.p is not None
    assert gain.p < 0.01

    verdict = judge(gain, 0.06, Spread(0.3, "own"))

    assert verdict.outcome == Outcome.NO_EVIDENCE
    assert verdict.text == "no evidence; uncorrected p 0.001"


@pytest.mark.parametrize("gap", [0.01, 1.0, 50.0, -50.0])
def test_one_seed_is_never_a_winner(gap):
    verdict = judge(gain_of(gap), None, Spread(2.0, "other arms"))

    assert verdict.outcome == Outcome.TOO_FEW
    assert verdict.text.startswith("too few seeds (1); at least 3 are needed")


def test_one_seed_says_how_many_are_needed():
    verdict = judge(gain_of(1.0), None, Spread(2.0, "other arms"))

    assert verdict.text.endswith("this gap needs 34 seeds")


def test_one_seed_without_any_spread():
    assert judge(gain_of(1.0), None, None).text == "too few seeds (1); at least 3 are needed"


def test_two_seeds_that_lie_close_are_no_winner():
    gain = gain_of(5.0, 5.01)
    assert gain.p is not None
    assert gain.p < 0.01

    assert judge(gain, gain.p, Spread(1.0, "other arms")).outcome == Outcome.TOO_FEW


def test_equal_differences_are_no_certainty():
    gain = gain_of(0.5, 0.5, 0.5)

    verdict = judge(gain, gain.p, Spread(1.0, "other arms"))

    assert verdict.outcome == Outcome.NO_EVIDENCE
    assert verdict.text == "no evidence; equal in every seed, so only more seeds can show"


def test_no_difference_at_all():
    assert judge(gain_of(0.0, 0.0, 0.0), 1.0, None).outcome == Outcome.NO_EVIDENCE
    assert "no difference" in judge(gain_of(0.0, 0.0, 0.0), 1.0, Spread(1.0, "other arms")).text


def test_nothing_to_compare_with():
    assert judge(None, None, None).outcome == Outcome.NOT_COMPARABLE
    assert judge(paired_gain({0: 1.0}, {1: 1.0}), None, None).outcome == Outcome.NOT_COMPARABLE


def test_seeds_asked_for_are_at_least_three():
    assert "needs 3 seeds" in judge(gain_of(90.0), None, Spread(0.1, "other arms")).text


def test_students_that_are_all_alike_are_seldom_called_winners():
    """Accuracies of 359 test images, as digits has: counts, so t's assumptions hold only about."""
    random = np.random.default_rng(0)
    calls = 0
    for _ in range(2000):
        arm, alone = random.binomial(359, 0.95, (2, 3)) / 3.59
        gain = paired_gain(dict(enumerate(arm)), dict(enumerate(alone)))
        calls += judge(gain, gain.p, None).outcome in (Outcome.REAL, Outcome.HURTS)

    assert calls / 2000 < 0.065


@pytest.mark.parametrize(
    ("p", "text"), [(1e-9, "<0.001"), (0.0123, "0.012"), (0.05003, "0.05003"), (0.4, "0.400"), (None, "–")]
)
def test_p_is_rounded_to_its_own_side_of_the_level(p, text):
    assert p_text(p) == text


def test_a_gain_in_text():
    # Standard deviation √0.1, over √5, times t(4) = 2.776445: ± 0.3926.
    assert mean_interval(gain_of(-0.8, -1.0, -1.2, -1.4, -1.6).difference) == "−1.20 [−1.59, −0.81]"
    assert mean_interval(gain_of(0.3).difference) == "+0.30"
    assert mean_interval(gain_of().difference) == "–"
    assert [signed(value) for value in (-0.004, 0.004, -0.006)] == ["0.00", "0.00", "−0.01"]
