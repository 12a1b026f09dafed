"""The curves of a run that a report plots, from its metrics.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FACTORS = {"val/acc": 100.0, "val/transfer_loss": 1.0, "train/gradient_ratio": 1.0}
"""The column of metrics.csv for each field of `Curves` → the factor to the field's unit."""


class Curves(NamedTuple):
    """Curves of one run, each step → value."""

    validation: dict[int, float]
    """validation accuracy, in percent"""
    transfer: dict[int, float]
    """transfer loss on the validation images, in the loss's own unit"""
    ratio: dict[int, float]
    """gradient norm of the weighted transfer loss over that of the weighted class loss"""


class Band(NamedTuple):
    """A curve over seeds."""

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    """with n − 1 degrees of freedom; 0 for one seed"""
    seeds: int


def read_curves(path: Path) -> Curves:
    """The curves in the file `path`: empty if it is absent or damaged, the complete lines if it is cut."""
    try:
        content = path.read_bytes()
        # What follows the last line break was being written when the process died.
        complete = content[: content.rfind(b"\n") + 1].decode()
        rows = [*csv.DictReader(io.StringIO(complete, newline=""))]
        return Curves(*(curve(rows, column, factor) for column, factor in FACTORS.items()))
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return Curves({}, {}, {})


def curve(rows: Sequence[Mapping[str, str]], column: str, factor: float) -> dict[int, float]:
    """Step → finite value of a column, times `factor`."""
    values = {int(row["step"]): factor * float(row[column]) for row in rows if row.get(column)}
    return {step: value for step, value in values.items() if math.isfinite(value)}


def band(curves: Sequence[dict[int, float]]) -> Band | None:
    """Mean and standard deviation over seeds, at the steps that all curves have; None if there are none."""
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in curves])
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return Band(np.array(steps), values.mean(0), std, len(curves))


def last(curve: dict[int, float]) -> float | None:
    """The value at the last step."""
    return curve[max(curve)] if curve else None


def median_ratio(curves: Curves) -> float | None:
    """The median of a run's gradient ratio over its training; None if it was never measured or is 0."""
    median = float(np.median([*curves.ratio.values()])) if curves.ratio else 0.0
    return median if median > 0 else None
