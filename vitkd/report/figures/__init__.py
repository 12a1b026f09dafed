"""The plots of an experiment."""

import matplotlib

from vitkd.report.comparison import Comparison
from vitkd.report.figures.fidelity import fidelity
from vitkd.report.figures.gains import gains, heat_map
from vitkd.report.figures.lines import accuracy_over_alpha, gradient_ratios, learning_curves
from vitkd.report.figures.plots import STYLE, PlotGroup


def plot_groups(comparison: Comparison) -> list[PlotGroup]:
    """All plots for which the runs of an experiment have data."""
    makers = [gains, heat_map, accuracy_over_alpha, learning_curves, gradient_ratios, fidelity]
    if len(comparison.rows) == 1:
        makers = [learning_curves]
    with matplotlib.rc_context(STYLE):
        groups = [make(comparison) for make in makers]
    runs = sum(len(arm.runs) for arm in comparison.experiment.rows)
    source = f"From {runs} runs: {comparison.experiment.title}."
    return [group._replace(caption=f"{group.caption} {source}") for group in groups if group.plots]
