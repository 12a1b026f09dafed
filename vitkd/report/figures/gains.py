"""The gain of every arm with its interval, one below the other."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitkd.report.comparison import Comparison, Row
from vitkd.report.figures.colours import BAD, GOOD, INK, QUIET
from vitkd.report.figures.drawing import WIDTH, PlotGroup, limits, new_axes, render, wrapped
from vitkd.report.verdicts import SIGNIFICANT, Outcome

MAX_ROWS = 60
"""Of one plot."""


def gains(comparison: Comparison) -> PlotGroup:
    """Every arm's gain, in as many plots as needed."""
    rows = [row for row in comparison.rows if row.gain and row.gain.difference.n]
    parts = [rows[start : start + MAX_ROWS] for start in range(0, len(rows), MAX_ROWS)]
    return PlotGroup(
        "Gain of every arm",
        "Gain over the student alone at the last epoch, paired by seed: mean and 95 % interval (Student's t;"
        " may extend beyond the frame; none for one seed). Small dots are single seeds. Filled circles are"
        " real gains or harm after Holm's correction.",
        [render("gain of every arm with its 95 % interval", draw_gains, part) for part in parts],
    )


def draw_gains(figure: Figure, rows: Sequence[Row]) -> None:
    """A circle and a bar for each row."""
    labels = [wrapped(row.arm.label) for row in rows]
    lines = len(labels) + sum(label.count("\n") for label in labels)
    figure.set_size_inches(WIDTH, 0.75 + 0.12 * (len(rows) + lines))
    axes = new_axes(figure, "gain, percentage points", "")
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, row in enumerate(rows):
        draw_gain(axes, y, row)
    axes.set_xlim(*limits([0.0, *(d for row in rows if row.gain for d in row.gain.differences)], 0.35))
    axes.set_yticks(range(len(rows)), labels, linespacing=0.95)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def draw_gain(axes: Axes, y: int, row: Row) -> None:
    """Mean, interval and single seeds at height `y`."""
    assert row.gain is not None
    difference, singles, outcome = row.gain.difference, row.gain.differences, row.verdict.outcome
    assert difference.mean is not None
    colour = {Outcome.REAL: GOOD, Outcome.HURTS: BAD}.get(outcome, QUIET)
    if difference.interval:
        axes.plot(difference.interval, (y, y), color=colour, solid_capstyle="butt")
    axes.plot(singles, [y] * len(singles), ".", color=colour, markersize=3, alpha=0.55)
    filling = colour if outcome in SIGNIFICANT else "none"
    axes.plot(difference.mean, y, "o", color=colour, markerfacecolor=filling, markersize=5.5)
