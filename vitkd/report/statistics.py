"""Statistics over few seeds: intervals, paired gains, power, and the number of seeds needed.

Pure functions of numbers; results have the unit of the input. All intervals are two-sided, nominally 95 %.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8

MIN_TO_RESAMPLE = 5
"""Three values have only ten different resamples."""

RESAMPLES = 9_999
BOOTSTRAP_COVERAGE = {5: 0.92, 10: 0.94}
"""Number of normally distributed differences → how often the nominal 95 % interval holds their mean."""

MAX_SEEDS = 10_000
"""A gap that needs more counts as undetectable."""

ROUNDING = 1e-9
"""Values whose standard deviation is below this fraction of them are equal up to float64 rounding."""


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


class Summary(NamedTuple):
    """A metric over seeds."""

    n: int
    mean: float | None
    """None without values"""
    std: float | None
    """with n − 1 degrees of freedom; None for fewer than two values"""
    interval: Interval | None
    """of the mean, by Student's t; None for fewer than two values or if all are equal"""


class Gain(NamedTuple):
    """The differences between an arm and the baseline, seed by seed."""

    seeds: tuple[int, ...]
    """shared by both"""
    differences: tuple[float, ...]
    """arm − baseline, one a seed"""
    difference: Summary
    """`differences` over seeds"""
    p: float | None
    """two-sided, uncorrected; None for fewer than two seeds"""
    bootstrap: Interval | None
    """of the mean difference; None where `bootstrap_interval` gives none"""


class Band(NamedTuple):
    """A curve over seeds."""

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    """with n − 1 degrees of freedom; 0 for one seed"""
    seeds: int


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval of `values`."""
    n, mean = len(values), float(np.mean(values)) if len(values) else None
    if mean is None or n == 1:
        return Summary(n, mean, None, None)
    std = standard_deviation(values)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * std / math.sqrt(n)
    return Summary(n, mean, std, Interval(mean - half, mean + half) if std else None)


def standard_deviation(values: Sequence[float]) -> float:
    """Of at least two values, with n − 1 degrees of freedom; exactly 0 if they are equal up to rounding."""
    std = float(np.std(values, ddof=1))
    return 0.0 if std <= ROUNDING * float(np.max(np.abs(values))) else std


def paired_gain(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Gain:
    """The gain of `arm` over `baseline`, both seed → value, over their shared seeds."""
    seeds = tuple(sorted(arm.keys() & baseline.keys()))
    gaps = tuple(arm[seed] - baseline[seed] for seed in seeds)
    return Gain(seeds, gaps, summarise(gaps), p_value(gaps), bootstrap_interval(gaps))


def p_value(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of a paired t test that the mean difference is 0; None for fewer than two.

    If all differences are equal, which happens with a few hundred test images, t is undefined. The exact
    sign-flip test (Fisher 1935) replaces it: 2 of the 2ⁿ sign patterns are as extreme.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, std = float(np.mean(differences)), standard_deviation(differences)
    if std == 0:
        return 1.0 if mean == 0 else 2.0 ** (1 - n)
    return float(2 * stats.t.sf(abs(mean) / std * math.sqrt(n), n - 1))


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> Interval | None:
    """The expanded BCa bootstrap interval of the mean; None for too few values, or if all are equal.

    BCa (Efron 1987) alone covers the mean of 5 normal values in 84 % of cases, not 95 %: resamples vary by
    √((n − 1)/n) too little and their quantiles are normal, not Student's t. Expanding the nominal level by
    both (Hesterberg 2015) gives `BOOTSTRAP_COVERAGE`.
    """
    n = len(differences)
    if n < MIN_TO_RESAMPLE or standard_deviation(differences) == 0:
        return None
    quantile = math.sqrt(n / (n - 1)) * stats.t.ppf(1 - LEVEL / 2, n - 1)
    ends = stats.bootstrap(
        (np.asarray(differences, float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * stats.norm.sf(quantile),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    interval = Interval(float(ends.low), float(ends.high))
    return interval if all(map(math.isfinite, interval)) else None


def power(n: int, effect: float) -> float:
    """The power of a paired t test at 5 % with `n` seeds, for a mean of `effect` standard deviations.

    t of n differences is noncentral with shift effect·√n (Johnson & Kotz 1970).
    """
    critical, shift = float(stats.t.ppf(1 - LEVEL / 2, n - 1)), abs(effect) * math.sqrt(n)
    other_tail = float(stats.nct.cdf(-critical, n - 1, shift))
    # SciPy returns NaN where that tail is negligible.
    return float(stats.nct.sf(critical, n - 1, shift)) + (0.0 if math.isnan(other_tail) else other_tail)


def seeds_needed(gap: float, std: float) -> int | None:
    """The fewest seeds that detect a true `gap` with power 0.8, if differences have deviation `std`.

    At least 2; None if more than `MAX_SEEDS` are needed.
    """
    if gap == 0:
        return None
    if std == 0:
        return 2
    effect = abs(gap) / std
    seeds = bisect_left(range(MAX_SEEDS + 1), POWER, lo=2, key=lambda n: power(n, effect))
    return seeds if seeds <= MAX_SEEDS else None


def pooled_std(summaries: Sequence[Summary]) -> float | None:
    """The pooled standard deviation, each weighted by n − 1; None if none has one."""
    known = [(summary.n - 1, summary.std) for summary in summaries if summary.std is not None]
    if not known:
        return None
    return math.sqrt(sum(weight * std**2 for weight, std in known) / sum(weight for weight, _ in known))


def band(curves: Sequence[dict[int, float]]) -> Band | None:
    """Mean and standard deviation over seeds, at the steps that all curves have; None if there are none."""
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in curves])
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return Band(np.array(steps), values.mean(0), std, len(curves))
