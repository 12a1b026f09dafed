"""The verdict on an arm, in words: real gain or harm needs three seeds and Holm's correction."""

from enum import StrEnum
from typing import NamedTuple

from vitkd.report.formatting import p_text
from vitkd.report.statistics import LEVEL, MAX_SEEDS, Gain, seeds_needed

MIN_SEEDS = 3
"""Two differences may be close to each other by chance."""


class Outcome(StrEnum):
    """The verdict as programs read it."""

    BASELINE = "baseline"
    REAL = "real"
    HURTS = "hurts"
    NO_EVIDENCE = "no evidence"
    TOO_FEW = "too few seeds"
    NOT_COMPARABLE = "not comparable"


SIGNIFICANT = (Outcome.REAL, Outcome.HURTS)


class Verdict(NamedTuple):
    """What the runs show, for programs and in words."""

    outcome: Outcome
    text: str


class Spread(NamedTuple):
    """The standard deviation of an arm's differences, and where it comes from."""

    std: float
    source: str
    """`own` differences, those of `other arms`, or `the student alone` over seeds"""


def judge(gain: Gain | None, p_holm: float | None, spread: Spread | None) -> Verdict:
    """The verdict on an arm.

    `gain` is over the student alone, or over a control, and None without a student alone; `p_holm` is its
    p-value after Holm's correction; the `spread` of the differences says how many seeds are needed.
    """
    if gain is None:
        return Verdict(Outcome.NOT_COMPARABLE, "no run of the student alone")
    n, mean = gain.difference.n, gain.difference.mean
    if mean is None:
        return Verdict(Outcome.NOT_COMPARABLE, "no seed shared with the student alone")
    if n < MIN_SEEDS:
        hint = "" if spread is None else f"; {seeds_hint(gain, spread)}"
        return Verdict(Outcome.TOO_FEW, f"too few seeds ({n}); at least {MIN_SEEDS} are needed{hint}")
    assert p_holm is not None
    if p_holm <= LEVEL:
        return Verdict(Outcome.REAL, "real gain") if mean > 0 else Verdict(Outcome.HURTS, "hurts")
    hint = seeds_hint(gain, spread)
    if gain.difference.std == 0 and mean:
        hint = "equal in every seed, so only more seeds can show"
    elif gain.p is not None and gain.p <= LEVEL:
        hint = f"uncorrected p {p_text(gain.p)}"
    return Verdict(Outcome.NO_EVIDENCE, f"no evidence; {hint}")


def seeds_hint(gain: Gain, spread: Spread | None) -> str:
    """How many seeds a gap needs, in words."""
    if round(gain.difference.mean or 0.0, 2) == 0:
        return "no difference"
    if spread is None:
        return "more seeds are needed"
    needed = seeds_to_detect(gain, spread)
    return f"this gap needs {f'{needed:,}' if needed else f'more than {MAX_SEEDS:,}'} seeds"


def seeds_to_detect(gain: Gain | None, spread: Spread | None) -> int | None:
    """Seeds that detect a gap of the observed size with power 0.8; None if unknown or too many."""
    if gain is None or gain.difference.mean is None or spread is None:
        return None
    seeds = seeds_needed(gain.difference.mean, spread.std)
    return None if seeds is None else max(seeds, MIN_SEEDS)
