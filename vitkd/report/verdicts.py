"""What may be said of an arm, in words: a winner needs three seeds and has to survive the whole grid."""

from enum import StrEnum
from typing import NamedTuple

from vitkd.report.statistics import LEVEL, MOST_SEEDS, Gain, seeds_needed

FEWEST_SEEDS = 3
"""Two differences that happen to lie close would pass for certainty."""


class Kind(StrEnum):
    """The verdict as a program reads it."""

    BASELINE = "baseline"
    REAL = "real"
    HURTS = "hurts"
    NO_EVIDENCE = "no evidence"
    TOO_FEW = "too few seeds"
    NOT_COMPARABLE = "not comparable"


class Verdict(NamedTuple):
    """What the runs allow to say."""

    kind: Kind
    words: str


class Spread(NamedTuple):
    """How far differences between seeds lie apart, and how that is known."""

    std: float
    source: str
    """`own` differences, those of `other arms`, or what `the student alone` does over seeds"""


def judge(
    gain: Gain | None, corrected: float | None, spread: Spread | None, family: str = "the grid"
) -> Verdict:
    """The verdict on an arm.

    Args:
        gain: over the student alone, or over a control, in percentage points; None where there is no
            student alone to compare with.
        corrected: the gain's p-value after Holm's correction.
        spread: of the differences, for saying how many seeds would do.
        family: all that the correction is for.
    """
    if gain is None:
        return Verdict(Kind.NOT_COMPARABLE, "no student alone to compare with")
    n, mean = gain.difference.n, gain.difference.mean
    if mean is None:
        return Verdict(Kind.NOT_COMPARABLE, "no seed in common with the student alone")
    remedy = resolving(mean, spread)
    if n == 1:
        return Verdict(Kind.TOO_FEW, f"one seed says nothing ({signed(mean)}): {remedy}")
    assert corrected is not None
    assert gain.p is not None
    if n < FEWEST_SEEDS:
        return Verdict(Kind.TOO_FEW, f"two seeds say little ({plus_minus(gain)}): {remedy}")
    told = f"{plus_minus(gain)}, {n} seeds"
    if corrected <= LEVEL and mean > 0:
        return Verdict(Kind.REAL, f"gain {told}, real")
    if corrected <= LEVEL:
        return Verdict(Kind.HURTS, f"hurts: {told}")
    if gain.difference.std == 0 and mean:
        remedy = "without a spread only more seeds can tell"
    elif gain.p <= LEVEL:
        remedy = f"{as_p(gain.p)} alone, {as_p(corrected)} over {family}"
    return Verdict(Kind.NO_EVIDENCE, f"no evidence: {told}; {remedy}")


def plus_minus(gain: Gain) -> str:
    """The mean difference and half its 95 % interval."""
    mean, interval = gain.difference.mean, gain.difference.interval
    assert mean is not None
    if interval is None:
        return f"{signed(mean)} in every seed"
    return f"{signed(mean)} ± {(interval.high - interval.low) / 2:.2f}"


def signed(value: float) -> str:
    """`+0.17` or `−0.67`."""
    return f"{value:+.2f}".replace("-", "−")


def resolving(gap: float, spread: Spread | None) -> str:
    """How many seeds would resolve a gap, in words."""
    if spread is None:
        return "how many would tell cannot be said before there are three"
    if round(gap, 2) == 0:
        return "there is no gap to resolve"
    needed = seeds_needed(gap, spread.std)
    if needed is None:
        return f"not even {MOST_SEEDS:,} seeds would resolve that"
    needed = max(needed, FEWEST_SEEDS)
    source = "" if spread.source == "own" else f", by the spread of {spread.source}"
    return f"{needed:,} seeds would resolve that{source}"


def as_p(p: float) -> str:
    """A p-value as papers write it."""
    return "p < 0.001" if p < 0.001 else f"p = {digits_of(p)}"


def digits_of(p: float) -> str:
    """Three decimals, or as many as it takes to tell on which side of the level it is."""
    for decimals in range(3, 7):
        text = f"{p:.{decimals}f}"
        if (float(text) <= LEVEL) == (p <= LEVEL) and float(text) != LEVEL:
            break
    return text
