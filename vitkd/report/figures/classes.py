"""Which classes gain: an arm against the student alone, class by class.

Shapes: C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from vitkd.explain.gallery.fonts import drawable
from vitkd.report.arms import Arm
from vitkd.report.comparison import Comparison
from vitkd.report.figures.gains import draw_interval, gain_axes
from vitkd.report.figures.plots import BAD, GOOD, QUIET, PlotGroup, limits, render
from vitkd.report.formatting import shortened
from vitkd.report.statistics import LEVEL, Summary, p_value, summarise
from vitkd.report.verdicts import MIN_SEEDS
from vitkd.statistics import holm

MAX_ARMS, MAX_CLASSES = 4, 20
"""Of the group, and of one plot."""


class ClassGain(NamedTuple):
    """The gain in the accuracy of one class, in percentage points."""

    name: str
    images: int
    """of the class, in the test split"""
    differences: tuple[float, ...]
    """arm − student alone, one a seed"""
    difference: Summary
    p_holm: float | None
    """corrected for all classes of the arm"""

    @property
    def mean(self) -> float:
        assert self.difference.mean is not None, "it has a seed"
        return self.difference.mean

    @property
    def is_significant(self) -> bool:
        """By the same rule as an arm's gain."""
        return self.difference.n >= MIN_SEEDS and self.p_holm is not None and self.p_holm <= LEVEL


def class_gains(comparison: Comparison) -> PlotGroup:
    """One plot for each of the arms with the largest gains."""
    baseline = comparison.experiment.baseline
    found = [(arm, gains_by_class(arm, baseline)) for arm in arms_by_gain(comparison) if baseline]
    shown = [(arm, gains) for arm, gains in found if gains][:MAX_ARMS]
    x_limits = limits([0.0, *(d for _, gains in shown for gain in gains for d in gain.differences)], 0.05)
    return PlotGroup(
        "Gain of every class",
        "Gain in the accuracy of each class over the student alone at the last epoch, paired by seed: mean"
        " and 95 % interval (Student's t; may extend beyond the frame; none for one seed). Small dots are"
        " single seeds; in brackets the number of test images. Filled circles are real gains or harm after"
        f" Holm's correction for all classes of the arm. Of more than {MAX_CLASSES} classes those with the"
        f" highest and the lowest means are shown, some of them extreme by chance; of more than {MAX_ARMS}"
        " arms those that gain most.",
        [
            render(f"gain of every class, {arm.label}", draw_classes, arm.label, gains, x_limits)
            for arm, gains in shown
        ],
    )


def arms_by_gain(comparison: Comparison) -> list[Arm]:
    """The arms that have a gain, the largest first."""
    gains = [(row.gain.difference.mean, row.arm) for row in comparison.rows if row.gain]
    known = [(mean, arm) for mean, arm in gains if mean is not None]
    return [arm for _, arm in sorted(known, key=lambda pair: -pair[0])]


def gains_by_class(arm: Arm, baseline: Arm) -> list[ClassGain]:
    """The gain of each class that is tested, over the seeds that both have, highest first."""
    pairs = [
        (mine, other)
        for seed in sorted(arm.runs.keys() & baseline.runs.keys())
        if (mine := arm.runs[seed].details) and (other := baseline.runs[seed].details)
    ]
    if len({each.class_names for pair in pairs for each in pair}) != 1:
        return []  # no seed that both have, or other classes
    by_class = zip(*(zip(a.class_accuracy, b.class_accuracy, strict=True) for a, b in pairs), strict=True)
    # A class without test images has no accuracy.
    gaps = [tuple(a - b for a, b in seeds if a is not None and b is not None) for seeds in by_class]
    facts = zip(*pairs[0][0][:2], gaps, holm([p_value(each) for each in gaps]), strict=True)
    gains = [ClassGain(name, images, each, summarise(each), p) for name, images, each, p in facts if each]
    return sorted(gains, key=lambda gain: -gain.mean)


def draw_classes(
    figure: Figure, title: str, gains: Sequence[ClassGain], x_limits: tuple[float, float]
) -> None:
    """A circle and a bar for each class, or for those at both ends."""
    half = MAX_CLASSES // 2
    shown = gains if len(gains) <= MAX_CLASSES else [*gains[:half], *gains[-half:]]
    labels = [f"{shortened(gain.name, 24)} ({gain.images:,})" for gain in shown]
    text, families = drawable("\n".join(labels))
    axes = gain_axes(figure, text.split("\n"), shortened(title, 52))
    for label in axes.get_yticklabels():
        label.set_fontfamily(families)
    if len(shown) < len(gains):
        axes.axhline(half - 0.5, color=QUIET, linewidth=0.8, linestyle=":")
    for y, gain in enumerate(shown):
        colour = (GOOD if gain.mean > 0 else BAD) if gain.is_significant else QUIET
        draw_interval(axes, y, gain.difference, gain.differences, colour, gain.is_significant)
    axes.set_xlim(*x_limits)
