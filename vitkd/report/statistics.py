"""What a few seeds can and cannot tell: intervals, paired gains, corrections, and how many seeds would.

Pure functions of figures; the unit of whatever goes in is the unit of what comes out. All intervals are
two-sided at 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8

FEWEST_TO_RESAMPLE = 5
"""Of three values a resample can be ten different ones: an interval made of those would pretend to know."""

MOST_SEEDS = 10_000
"""Nobody trains more; beyond that a gap counts as not to be resolved."""

RESAMPLES = 9_999
ROUNDING = 1e-9
"""A spread below this share of the values is what float64 left of equal ones."""


class Interval(NamedTuple):
    """From … to …"""

    low: float
    high: float


class Summary(NamedTuple):
    """A figure over seeds."""

    n: int
    mean: float | None
    """None for no value"""
    std: float | None
    """with n − 1 below; None for fewer than two values"""
    interval: Interval | None
    """Student's t, of the mean; None for fewer than two values or ones that are all equal"""


class Gain(NamedTuple):
    """What an arm has over the baseline, seed by seed."""

    seeds: tuple[int, ...]
    """those that both have"""
    differences: tuple[float, ...]
    """arm − baseline, one a seed"""
    difference: Summary
    """over seeds"""
    p: float | None
    """two-sided, of no difference, uncorrected; None for fewer than two seeds"""
    bootstrap: Interval | None
    """BCa (Efron 1987) of the mean difference; None where `bootstrap_interval` refuses"""


def summarise(values: Sequence[float]) -> Summary:
    """Mean, spread and interval of `values`."""
    n = len(values)
    if n == 0:
        return Summary(0, None, None, None)
    mean = float(np.mean(values))
    if n == 1:
        return Summary(1, mean, None, None)
    std = spread(values)
    if std == 0:
        return Summary(n, mean, 0.0, None)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * std / math.sqrt(n)
    return Summary(n, mean, std, Interval(mean - half, mean + half))


def spread(values: Sequence[float]) -> float:
    """The standard deviation of at least two values; exactly 0 for values equal up to rounding."""
    std = float(np.std(values, ddof=1))
    return 0.0 if std <= ROUNDING * float(np.max(np.abs(values))) else std


def paired_gain(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Gain:
    """The gain of `arm` over `baseline`, both seed → figure, over the seeds that both have."""
    seeds = tuple(sorted(arm.keys() & baseline.keys()))
    apart = tuple(arm[seed] - baseline[seed] for seed in seeds)
    return Gain(seeds, apart, summarise(apart), p_value(apart), bootstrap_interval(apart))


def p_value(differences: Sequence[float]) -> float | None:
    """How often a mean so far from 0 comes about without any difference: the paired t test, two-sided.

    Where all differences are equal, as counts of a few hundred images may be, t divides by zero. Then the
    exact sign-flip test (Fisher 1935) stands in: 2 of the 2ⁿ ways to flip signs are as extreme.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, std = float(np.mean(differences)), spread(differences)
    if std == 0:
        return 1.0 if mean == 0 else 2.0 ** (1 - n)
    return float(2 * stats.t.sf(abs(mean) / std * math.sqrt(n), n - 1))


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> Interval | None:
    """The BCa bootstrap interval of the mean; None for too few values, or for equal ones."""
    if len(differences) < FEWEST_TO_RESAMPLE or spread(differences) == 0:
        return None
    found = stats.bootstrap(
        (np.asarray(differences, float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    interval = Interval(float(found.low), float(found.high))
    return interval if all(map(math.isfinite, interval)) else None


def power(n: int, effect: float) -> float:
    """The chance that `n` seeds show a mean difference of `effect` standard deviations (paired t, 5 %).

    t of n differences is noncentral with shift effect·√n (Johnson & Kotz 1970).
    """
    critical, shift = float(stats.t.ppf(1 - LEVEL / 2, n - 1)), abs(effect) * math.sqrt(n)
    other_tail = float(stats.nct.cdf(-critical, n - 1, shift))
    # SciPy gives NaN where that tail is too thin for it, which is far below what matters here.
    return float(stats.nct.sf(critical, n - 1, shift)) + (0.0 if math.isnan(other_tail) else other_tail)


def seeds_needed(gap: float, std: float) -> int | None:
    """The fewest seeds that would show a true `gap` with power 0.8, where differences spread by `std`.

    None if even `MOST_SEEDS` would not. At least 2: one seed shows nothing, whatever the gap.
    """
    if gap == 0:
        return None
    if std == 0:
        return 2
    effect = abs(gap) / std
    if power(MOST_SEEDS, effect) < POWER:
        return None
    too_few, enough = 1, 2
    while power(enough, effect) < POWER:
        too_few, enough = enough, min(2 * enough, MOST_SEEDS)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if power(middle, effect) >= POWER else (middle, enough)
    return enough


def pooled_std(summaries: Sequence[Summary]) -> float | None:
    """One standard deviation for all, each weighing with its n − 1; None if none has one."""
    known = [(summary.n - 1, summary.std) for summary in summaries if summary.std is not None]
    if not known:
        return None
    return math.sqrt(sum(weight * std**2 for weight, std in known) / sum(weight for weight, _ in known))
