"""Mean gains as a coloured grid: transfer loss × alpha."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from vitkd.report.comparison import Comparison, Row
from vitkd.report.figures.colours import INK, readable_on
from vitkd.report.figures.drawing import ALPHA_LABEL, WIDTH, PlotGroup, new_axes, render, shortened
from vitkd.report.formatting import signed
from vitkd.report.verdicts import SIGNIFICANT

COLOURS = "coolwarm_r"
"""Perceptually uniform from red (loss) over grey to blue (gain); Moreland 2009."""


def heat_map(comparison: Comparison) -> PlotGroup:
    """One cell an attention arm."""
    cells = {
        (row.arm.label_without_alpha, row.arm.alpha): row
        for row in comparison.rows
        if row.arm.granularity and row.arm.alpha is not None and row.gain and row.gain.seeds
    }
    return PlotGroup(
        "Heat map of the gains",
        "Mean gain over the student alone at the last epoch, paired by seed: blue is better, red worse."
        " Bold with *: real gain or harm after Holm's correction; all others may be chance.",
        [render("gain by granularity, loss and alpha", draw_cells, cells)] if cells else [],
    )


def draw_cells(figure: Figure, cells: Mapping[tuple[str, float], Row]) -> None:
    """Coloured cells with their gains, and a colour bar."""
    labels, alphas = list(dict.fromkeys(label for label, _ in cells)), sorted({alpha for _, alpha in cells})
    values = np.full((len(labels), len(alphas)), np.nan)
    for (label, alpha), row in cells.items():
        values[labels.index(label), alphas.index(alpha)] = mean_gain(row)
    largest = max(0.01, float(np.nanmax(np.abs(values))))

    figure.set_size_inches(WIDTH, 1.15 + 0.36 * len(labels))
    axes = new_axes(figure, ALPHA_LABEL, "")
    axes.grid(visible=False)
    mesh = axes.pcolormesh(values, cmap=COLOURS, norm=TwoSlopeNorm(0, -largest, largest))
    for (label, alpha), row in cells.items():
        write_gain(axes, mesh, alphas.index(alpha), labels.index(label), row)
    axes.set_xticks(np.arange(len(alphas)) + 0.5, [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(np.arange(len(labels)) + 0.5, [shortened(label) for label in labels])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    add_colour_bar(figure, axes, mesh)


def write_gain(axes: Axes, mesh: QuadMesh, column: int, line: int, row: Row) -> None:
    """The gain in its cell, and that it is of one seed only."""
    gain, is_significant = mean_gain(row), row.verdict.outcome in SIGNIFICANT
    one_seed = "\n1 seed" if row.gain and row.gain.difference.n == 1 else ""
    axes.text(
        column + 0.5,
        line + 0.5,
        f"{signed(gain)}{' *' if is_significant else ''}{one_seed}",
        ha="center",
        va="center",
        size=8,
        weight="bold" if is_significant else "normal",
        color=readable_on(matplotlib.colormaps[COLOURS](mesh.norm(gain))),
    )


def add_colour_bar(figure: Figure, axes: Axes, mesh: QuadMesh) -> None:
    """The scale of the colours."""
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("gain, percentage points", color=INK)
    bar.ax.tick_params(colors=INK, length=2)
    bar.outline.set_visible(False)


def mean_gain(row: Row) -> float:
    """In percentage points."""
    assert row.gain is not None
    assert row.gain.difference.mean is not None
    return row.gain.difference.mean
