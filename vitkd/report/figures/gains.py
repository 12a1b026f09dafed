"""The gains of all arms: with intervals, and as a heat map over alpha."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitkd.colours import readable_on
from vitkd.report.comparison import Comparison, Row
from vitkd.report.figures.lines import ALPHA_LABEL
from vitkd.report.figures.plots import BAD, GOOD, INK, QUIET, PlotGroup, limits, new_axes, render, wrapped
from vitkd.report.formatting import signed
from vitkd.report.statistics import Summary
from vitkd.report.verdicts import SIGNIFICANT, Outcome

MAX_ROWS = 60
"""Of one plot."""

HEAT = matplotlib.colormaps["coolwarm_r"]
"""Perceptually uniform from red (loss) over grey to blue (gain); Moreland 2009."""


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
    axes = gain_axes(figure, [wrapped(row.arm.label) for row in rows])
    for y, row in enumerate(rows):
        draw_gain(axes, y, row)
    axes.set_xlim(*limits([0.0, *(d for row in rows if row.gain for d in row.gain.differences)], 0.35))


def gain_axes(figure: Figure, labels: Sequence[str], title: str = "") -> Axes:
    """Axes with a row for each label, for which the figure grows, and a line at 0."""
    lines = len(labels) + sum(label.count("\n") for label in labels)
    figure.set_figheight(0.75 + 0.12 * (len(labels) + lines) + (0.2 if title else 0))
    axes = new_axes(figure, "gain, percentage points", "", title)
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, linespacing=0.95, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return axes


def draw_gain(axes: Axes, y: int, row: Row) -> None:
    """An arm's gain at height `y`."""
    assert row.gain is not None
    outcome = row.verdict.outcome
    colour = {Outcome.REAL: GOOD, Outcome.HURTS: BAD}.get(outcome, QUIET)
    draw_interval(axes, y, row.gain.difference, row.gain.differences, colour, outcome in SIGNIFICANT)


def draw_interval(
    axes: Axes, y: int, difference: Summary, singles: Sequence[float], colour: str, is_filled: bool
) -> None:
    """Mean, interval and single seeds at height `y`."""
    assert difference.mean is not None
    if difference.interval:
        axes.plot(difference.interval, (y, y), color=colour, solid_capstyle="butt")
    axes.plot(singles, [y] * len(singles), ".", color=colour, markersize=3, alpha=0.55)
    filling = colour if is_filled else "none"
    axes.plot(difference.mean, y, "o", color=colour, markerfacecolor=filling, markersize=5.5)


def heat_map(comparison: Comparison) -> PlotGroup:
    """One cell an attention arm."""
    cells = {
        (row.arm.label_without_alpha, row.arm.alpha): (row.gain.difference.mean, row)
        for row in comparison.rows
        if row.arm.granularity and row.gain and row.gain.difference.mean is not None
    }
    return PlotGroup(
        "Heat map of the gains",
        "Mean gain over the student alone at the last epoch, paired by seed: blue is better, red worse."
        " Bold with *: real gain or harm after Holm's correction; all others may be chance.",
        [render("gain by granularity, loss and alpha", draw_cells, cells)] if cells else [],
    )


def draw_cells(figure: Figure, cells: Mapping[tuple[str, float], tuple[float, Row]]) -> None:
    """Coloured cells with their gains."""
    labels, alphas = list(dict.fromkeys(label for label, _ in cells)), sorted({alpha for _, alpha in cells})
    largest = max(0.01, *(abs(gain) for gain, _ in cells.values()))
    values = np.full((len(labels), len(alphas)), np.nan)
    figure.set_figheight(1.15 + 0.36 * len(labels))
    axes = new_axes(figure, ALPHA_LABEL, "")
    axes.grid(visible=False)
    for (label, alpha), (gain, row) in cells.items():
        y, x = labels.index(label), alphas.index(alpha)
        values[y, x] = gain
        write_gain(axes, x + 0.5, y + 0.5, gain, row, readable_on(HEAT((gain / largest + 1) / 2)))
    axes.pcolormesh(values, cmap=HEAT, vmin=-largest, vmax=largest)
    axes.set_xticks(np.arange(len(alphas)) + 0.5, [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(np.arange(len(labels)) + 0.5, [wrapped(label, 28) for label in labels])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def write_gain(axes: Axes, x: float, y: float, gain: float, row: Row, colour: str) -> None:
    """The gain in its cell, whether it is significant, and whether it is of one seed only."""
    is_significant = row.verdict.outcome in SIGNIFICANT
    text = f"{signed(gain)}{' *' if is_significant else ''}"
    if row.gain and row.gain.difference.n == 1:
        text += "\n1 seed"
    weight = "bold" if is_significant else "normal"
    axes.text(x, y, text, ha="center", va="center", size=8, weight=weight, color=colour)
