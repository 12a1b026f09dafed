"""Reliability diagrams: how often a student is right, over how sure it is.

Shapes: B bins of confidence, n seeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitkd.report.arms import ALONE, Arm
from vitkd.report.comparison import Comparison
from vitkd.report.figures.plots import INK, QUIET, PlotGroup, new_axes, ramp, render
from vitkd.report.formatting import mean_std, shortened
from vitkd.report.parsing import Bins
from vitkd.report.settings import group_by

MIN_IMAGES = 10
"""Of a bin that is drawn, over all seeds."""
SMALLEST, LARGEST = 4.0, 70.0
"""Areas of the dots, in points², for no image and for all."""


class Reliability(NamedTuple):
    """An arm's bins that have enough images, [B'] each, in percent."""

    confidence: np.ndarray
    accuracy: np.ndarray
    std: np.ndarray
    """of the accuracy over seeds, each weighted by its images; 0 for one seed"""
    share: np.ndarray
    """of all images"""


def calibration(comparison: Comparison) -> PlotGroup:
    """One plot for each transfer loss, one line for each alpha, and the student alone."""
    experiment = comparison.experiment
    plots = []
    by_label = group_by(experiment.arms or experiment.rows, lambda arm: arm.label_without_alpha)
    for label, arms in by_label.items():
        lines = [(arm, pooled) for arm in arms if (pooled := reliability_of(arm))]
        if not lines:
            continue
        if experiment.arms and experiment.baseline and (alone := reliability_of(experiment.baseline)):
            lines.insert(0, (experiment.baseline, alone))
        alphas = sorted({arm.alpha for arm in experiment.arms})
        plots.append(render(f"reliability diagram, {label}", draw_reliability, lines, label, alphas))
    return PlotGroup(
        "Calibration",
        "How often the student of the last epoch is right, over how sure it is: test images in bins of its"
        " confidence, the probability of the predicted class. On the thin line it is as sure as it is right,"
        " below it too sure. Seeds are pooled, bands ± one standard deviation over seeds; dots grow with the"
        f" number of images, bins of fewer than {MIN_IMAGES} are left out. ECE, the expected calibration"
        " error, is the mean distance from the line over images, in percentage points, ± one standard"
        " deviation over seeds.",
        plots,
    )


def reliability_of(arm: Arm) -> Reliability | None:
    """The bins of an arm's runs, pooled over seeds; None if no run has enough images in any."""
    found = [run.details.bins for run in arm.runs.values() if run.details]
    found = [bins for bins in found if len(bins.images) == len(found[0].images)]
    return pool(found) if found else None


def pool(seeds: Sequence[Bins]) -> Reliability | None:
    """The bins of several runs as one; None if none has enough images."""
    # None is 0 here: a bin without images weighs nothing.
    images, confidence, accuracy = np.nan_to_num(np.array([*seeds], float)).swapaxes(0, 1)  # [n, B] each
    total = images.sum(0)
    kept = total >= MIN_IMAGES
    if not kept.any():
        return None
    images, confidence, accuracy, total = images[:, kept], confidence[:, kept], accuracy[:, kept], total[kept]
    mean_confidence, mean = ((images * values).sum(0) / total for values in (confidence, accuracy))
    n = (images > 0).sum(0)
    variance = (images * (accuracy - mean) ** 2).sum(0) / total * n / np.maximum(n - 1, 1)
    return Reliability(mean_confidence, mean, np.sqrt(variance), total / total.sum())


def draw_reliability(
    figure: Figure, lines: Sequence[tuple[Arm, Reliability]], title: str, alphas: Sequence[float]
) -> None:
    """One line, its dots and its band an arm."""
    axes = new_axes(figure, "confidence, %", "accuracy, %", shortened(title))
    axes.plot((0, 100), (0, 100), color=INK, linewidth=0.8)
    for arm, pooled in lines:
        colour = QUIET if arm.is_baseline else ramp(alphas.index(arm.alpha), len(alphas))
        draw_arm(axes, arm, pooled, colour)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)


def draw_arm(axes: Axes, arm: Arm, pooled: Reliability, colour: str) -> None:
    """Its name says its calibration error too."""
    name = ALONE if arm.is_baseline else f"alpha {arm.alpha:g}"
    label = f"{name}: ECE {mean_std(arm.summary('ece'))}"
    at, mean, std, share = pooled
    axes.plot(at, mean, color=colour, linestyle="--" if arm.is_baseline else "-", label=label)
    sizes = SMALLEST + (LARGEST - SMALLEST) * share
    axes.scatter(at, mean, s=sizes, color=colour, linewidths=0, clip_on=False, zorder=3)
    axes.fill_between(at, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)
