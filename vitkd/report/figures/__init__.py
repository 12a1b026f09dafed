"""The plots of an experiment."""

import matplotlib

from vitkd.report.comparison import Comparison
from vitkd.report.figures.drawing import STYLE, PlotGroup
from vitkd.report.figures.fidelity import fidelity
from vitkd.report.figures.gains import gains, heat_map
from vitkd.report.figures.learning_curves import learning_curves
from vitkd.report.figures.over_alpha import accuracy_over_alpha, gradient_ratios


def plot_groups(comparison: Comparison) -> list[PlotGroup]:
    """All plots for which the runs of an experiment have data."""
    makers = [gains, heat_map, accuracy_over_alpha, learning_curves, gradient_ratios, fidelity]
    if len(comparison.rows) == 1:
        makers = [learning_curves]
    with matplotlib.rc_context(STYLE):
        groups = [make(comparison) for make in makers]
    return [
        group._replace(caption=f"{group.caption} {source(comparison)}") for group in groups if group.plots
    ]


def source(comparison: Comparison) -> str:
    """Which runs are plotted."""
    runs = sum(len(arm.runs) for arm in comparison.experiment.rows)
    return f"From {runs} runs: {comparison.experiment.title}."
