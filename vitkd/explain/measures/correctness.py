"""Is a student right on the images on which it attends as its teacher does?

Shapes: N images.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


class Correlation(NamedTuple):
    """How a metric per image goes with being right; NaN, with the reason, where that is undefined."""

    r: float
    """point-biserial correlation: Pearson's, with right = 1 and wrong = 0"""
    p: float
    """two-sided, of r = 0, by Student's t with n − 2 degrees of freedom"""
    auc: float
    """area under the ROC curve: the chance that a right image's value is above a wrong one's, ties half"""
    interval: tuple[float, float]
    """95 % of r, by the percentile bootstrap over images"""
    n: int
    """images that count"""
    reason: str = ""
    """why values are NaN, in words"""


def correctness_correlation(
    fidelity: ArrayLike,
    student_right: ArrayLike,
    *,
    among: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """How a per-image fidelity goes with the student being right.

    A correlation is no cause: an easy image may be attended faithfully and be right because it is easy.
    There is less of that `among` the images that the teacher has right.

    Args:
        fidelity: [N], any metric of `distances`; of a divergence, which falls with fidelity, a negative r and
            an AUC below one half say that faithful maps are right. Left out where it is not finite.
        student_right: [N] bool.
        among: [N] bool, the images that count; None for all.
        resamples: how often the bootstrap draws N images.
        seed: of the bootstrap.

    Raises:
        ValueError: the arrays differ in length.
    """
    x, right = _array(fidelity).astype(np.float64), _array(student_right).astype(bool)
    counts = np.ones_like(right) if among is None else _array(among).astype(bool)
    if not x.shape == right.shape == counts.shape or x.ndim != 1:
        raise ValueError(f"not equally many images: {x.shape}, {right.shape} and {counts.shape}")
    counts &= np.isfinite(x)
    x, right = x[counts], right[counts]
    if reason := _why_undefined(x, right):
        nan = math.nan
        # Values that are all equal still rank: no better than chance.
        return Correlation(nan, nan, _auc(x, right), (nan, nan), len(x), reason)
    r, p = map(float, stats.pearsonr(x, right))
    return Correlation(r, p, _auc(x, right), _bootstrap(x, right, resamples, seed), len(x))


def _array(values: Any) -> NDArray[Any]:
    """As NumPy's, from a tensor on whatever device too."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _why_undefined(x: NDArray[np.float64], right: NDArray[np.bool_]) -> str:
    n = len(x)
    if n < 3:
        return f"{n} images with a value: a correlation takes 3 at least"
    if right.all() or not right.any():
        return f"the student is {'right' if right.all() else 'wrong'} on all {n} images"
    if x.min() == x.max():
        return f"the metric is {x[0]:.4g} on all {n} images"
    return ""


def _auc(x: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """From the rank sum of the right images (Mann & Whitney's U); NaN without right or without wrong ones."""
    hits = int(right.sum())
    misses = len(right) - hits
    if not hits or not misses:
        return math.nan
    u = stats.rankdata(x)[right].sum() - hits * (hits + 1) / 2
    return float(u / (hits * misses))


def _bootstrap(
    x: NDArray[np.float64], right: NDArray[np.bool_], resamples: int, seed: int
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of r over resampled images; resamples without an r do not count."""
    # r is the same for z, whose sums of squares cancel nothing away.
    z, y = (x - x.mean()) / x.std(), right.astype(np.float64)
    terms = np.stack([z, z * z, y, z * y], 1)
    n, random = len(x), np.random.default_rng(seed)
    draws = (np.bincount(random.integers(n, size=n), minlength=n) for _ in range(resamples))
    z1, z2, y1, zy = np.array([times @ terms for times in draws]).T / n
    variances = (z2 - z1 * z1) * (y1 - y1 * y1)
    defined = variances > 1e-14
    if not defined.any():
        return math.nan, math.nan
    r = (zy - z1 * y1)[defined] / np.sqrt(variances[defined])
    low, high = np.percentile(r.clip(-1, 1), [2.5, 97.5])
    return float(low), float(high)
