"""What is said of an arm, and above all what is not."""

import re

import numpy as np
import pytest

from vitkd.report.statistics import Gain, paired_gain
from vitkd.report.verdicts import Kind, Spread, as_p, judge


def gain_of(*differences: float) -> Gain:
    return paired_gain(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))


def test_a_real_gain_is_called_one():
    # Standard deviation √0.1, over √5, times t(4) = 2.776445: ± 0.3926.
    verdict = judge(gain_of(0.8, 1.0, 1.2, 1.4, 1.6), 0.01, Spread(0.3, "own"))

    assert verdict == (Kind.REAL, "gain +1.20 ± 0.39, 5 seeds, real")


def test_harm_is_called_harm():
    verdict = judge(gain_of(-0.8, -1.0, -1.2, -1.4, -1.6), 0.01, Spread(0.3, "own"))

    assert verdict == (Kind.HURTS, "hurts: −1.20 ± 0.39, 5 seeds")


def test_no_evidence_tells_how_many_seeds_would_do():
    # A gap of half a standard deviation takes 34 seeds.
    verdict = judge(gain_of(-1.0, 0.5, 2.0), 0.7, Spread(1.0, "own"))

    assert verdict.kind == Kind.NO_EVIDENCE
    assert verdict.words == "no evidence: +0.50 ± 3.73, 3 seeds; 34 seeds would resolve that"


def test_an_uncorrected_p_makes_no_winner():
    gain = gain_of(0.8, 1.0, 1.2, 1.4, 1.6)
    assert gain.p is not None
    assert gain.p < 0.01

    verdict = judge(gain, 0.06, Spread(0.3, "own"))

    assert verdict.kind == Kind.NO_EVIDENCE
    assert "p = 0.001 alone, p = 0.060 over the grid" in verdict.words


@pytest.mark.parametrize("gap", [0.01, 1.0, 50.0, -50.0])
def test_one_seed_is_never_a_winner(gap):
    verdict = judge(gain_of(gap), None, Spread(2.0, "other arms"))

    assert verdict.kind == Kind.TOO_FEW
    assert verdict.words.startswith("one seed says nothing")


def test_one_seed_is_told_how_many_it_takes():
    verdict = judge(gain_of(1.0), None, Spread(2.0, "other arms"))

    assert verdict.words.endswith("34 seeds would resolve that, by the spread of other arms")


def test_one_seed_and_nothing_to_go_by():
    assert "cannot be said" in judge(gain_of(1.0), None, None).words


def test_two_seeds_that_lie_close_are_no_winner():
    gain = gain_of(5.0, 5.01)
    assert gain.p is not None
    assert gain.p < 0.01

    assert judge(gain, gain.p, Spread(1.0, "other arms")).kind == Kind.TOO_FEW


def test_equal_differences_are_no_certainty():
    gain = gain_of(0.5, 0.5, 0.5)

    verdict = judge(gain, gain.p, Spread(1.0, "other arms"))

    assert verdict.kind == Kind.NO_EVIDENCE
    assert (
        verdict.words
        == "no evidence: +0.50 in every seed, 3 seeds; without a spread only more seeds can tell"
    )


def test_no_difference_at_all():
    assert judge(gain_of(0.0, 0.0, 0.0), 1.0, None).kind == Kind.NO_EVIDENCE
    assert "no gap" in judge(gain_of(0.0, 0.0, 0.0), 1.0, Spread(1.0, "other arms")).words


def test_nothing_to_compare_with():
    assert judge(None, None, None).kind == Kind.NOT_COMPARABLE
    assert judge(paired_gain({0: 1.0}, {1: 1.0}), None, None).kind == Kind.NOT_COMPARABLE


def test_seeds_asked_for_are_at_least_three():
    assert " 3 seeds would" in judge(gain_of(90.0), None, Spread(0.1, "other arms")).words


def test_students_that_are_all_alike_are_seldom_called_winners():
    """Accuracies of 359 test images, as digits has: counts, so t's assumptions hold only about."""
    random = np.random.default_rng(0)
    calls = 0
    for _ in range(2000):
        arm, alone = random.binomial(359, 0.95, (2, 3)) / 3.59
        gain = paired_gain(dict(enumerate(arm)), dict(enumerate(alone)))
        calls += judge(gain, gain.p, None).kind in (Kind.REAL, Kind.HURTS)

    assert calls / 2000 < 0.065


@pytest.mark.parametrize(
    ("p", "words"), [(1e-9, "p < 0.001"), (0.0123, "p = 0.012"), (0.05003, "p = 0.05003"), (0.4, "p = 0.400")]
)
def test_p_is_rounded_to_its_own_side_of_the_level(p, words):
    assert as_p(p) == words


def test_words_have_no_hyphen_for_a_minus():
    verdict = judge(gain_of(-1.0), None, Spread(2.0, "own"))

    assert not re.search(r"-\d", verdict.words)
