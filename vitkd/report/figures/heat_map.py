"""Mean gains as a coloured grid: transfer loss × alpha."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitkd.report.comparison import Comparison, Row
from vitkd.report.figures.colours import readable_on
from vitkd.report.figures.drawing import ALPHA_LABEL, WIDTH, PlotGroup, new_axes, render, wrapped
from vitkd.report.formatting import signed
from vitkd.report.verdicts import SIGNIFICANT

COLOURS = matplotlib.colormaps["coolwarm_r"]
"""Perceptually uniform from red (loss) over grey to blue (gain); Moreland 2009."""


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
    figure.set_size_inches(WIDTH, 1.15 + 0.36 * len(labels))
    axes = new_axes(figure, ALPHA_LABEL, "")
    axes.grid(visible=False)
    for (label, alpha), (gain, row) in cells.items():
        y, x = labels.index(label), alphas.index(alpha)
        values[y, x] = gain
        write_gain(axes, x + 0.5, y + 0.5, gain, row, readable_on(COLOURS((gain / largest + 1) / 2)))
    axes.pcolormesh(values, cmap=COLOURS, vmin=-largest, vmax=largest)
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
