"""The curves of runs, from their metrics.csv: what is drawn, and nothing else."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitkd.report.runs import Run

VALIDATION, TRANSFER, RATIO = "val/acc", "val/transfer_loss", "train/gradient_ratio"


class Curves(NamedTuple):
    """What a report draws of one run; each curve is step → value."""

    validation: dict[int, float]
    """accuracy on the validation images, in percent"""
    transfer: dict[int, float]
    """attention loss on the validation images, in the loss's own unit"""
    ratio: dict[int, float]
    """weighted norm of the attention loss's gradient over the class loss's"""


class Band(NamedTuple):
    """A curve over seeds."""

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    """with n − 1 below; 0 for one seed"""
    seeds: int


def read_curves(path: Path) -> Curves:
    """The curves in the file `path`; empty ones if it is absent, and what is whole of a cut one."""
    curves = Curves({}, {}, {})
    try:
        written = path.read_bytes()
        # What follows the last line break was being written when the process died.
        rows = csv.reader(io.StringIO(written[: written.rfind(b"\n") + 1].decode(), newline=""))
        header = next(rows, [])
        step = header.index("step")
        columns = [
            (header.index(name), curve, scale)
            for name, curve, scale in zip((VALIDATION, TRANSFER, RATIO), curves, (100, 1, 1), strict=True)
            if name in header
        ]
        for row in rows:
            for column, curve, scale in columns:
                if column < len(row) and row[column]:
                    value = float(row[column])
                    if math.isfinite(value):
                        curve[int(row[step])] = scale * value
    except (OSError, ValueError, csv.Error):
        pass  # what was read so far is good
    return curves


def band(curves: Sequence[dict[int, float]]) -> Band | None:
    """Mean and spread of several seeds' curves over the steps that all of them have; None for none."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    steps = sorted(set.intersection(*({*curve} for curve in curves)))
    if not steps:
        return None
    values = np.array([[curve[step] for step in steps] for curve in curves])
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return Band(np.array(steps), values.mean(0), std, len(curves))


def last(curve: dict[int, float]) -> float | None:
    """The value at the last step."""
    return curve[max(curve)] if curve else None


def typical_ratio(curves: Curves) -> float | None:
    """The median of a run's gradient ratio over its training; None if it was never measured or is 0."""
    median = float(np.median([*curves.ratio.values()])) if curves.ratio else 0.0
    return median if median > 0 else None


class Reader:
    """Reads each run's file once."""

    def __init__(self) -> None:
        self._read: dict[Path, Curves] = {}

    def __call__(self, run: Run) -> Curves:
        if run.path not in self._read:
            self._read[run.path] = read_curves(run.curves)
        return self._read[run.path]
