"""Validation accuracy over epochs."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitkd.report.arms import ALONE, Arm
from vitkd.report.comparison import Comparison
from vitkd.report.curves import Band, band
from vitkd.report.experiments import Experiment
from vitkd.report.figures.colours import QUIET, ramp
from vitkd.report.figures.drawing import PlotGroup, legend_below, new_axes, render, shortened
from vitkd.report.settings import group_by


def learning_curves(comparison: Comparison) -> PlotGroup:
    """One plot for each transfer loss, one line for each alpha, and the student alone."""
    experiment = comparison.experiment
    plots = []
    for label, arms in group_by(
        experiment.arms or experiment.rows, lambda arm: arm.label_without_alpha
    ).items():
        bands = [(arm, found) for arm in arms if (found := band_of(arm))]
        if not bands:
            continue
        if experiment.arms and experiment.baseline and (alone := band_of(experiment.baseline)):
            bands.insert(0, (experiment.baseline, alone))
        plots.append(render(f"learning curves, {label}", draw_curves, bands, label, experiment))
    return PlotGroup(
        "Learning curves",
        "Accuracy on the validation images after each epoch: mean over seeds, band ± one standard deviation.",
        plots,
    )


def band_of(arm: Arm) -> Band | None:
    """An arm's validation accuracy over its seeds."""
    return band([run.curves.validation for run in arm.runs.values()])


def draw_curves(
    figure: Figure, bands: Sequence[tuple[Arm, Band]], title: str, experiment: Experiment
) -> None:
    """One line and band an arm."""
    alphas = sorted({arm.alpha for arm in experiment.arms})
    epoch = steps_per_epoch(experiment)
    axes = new_axes(figure, "epoch" if epoch else "step", "validation accuracy, %", shortened(title))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arm, curve in bands:
        label, colour, line = ALONE, QUIET, "--"
        if not arm.is_baseline:
            label, colour, line = f"alpha {arm.alpha:g}", ramp(alphas.index(arm.alpha), len(alphas)), "-"
        at = curve.steps / (epoch or 1)
        axes.plot(at, curve.mean, color=colour, linestyle=line, label=label)
        low, high = curve.mean - curve.std, curve.mean + curve.std
        axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    legend_below(figure, axes)


def steps_per_epoch(experiment: Experiment) -> float | None:
    """Optimizer steps in an epoch; None if no run counted them."""
    runs = [run for arm in experiment.rows for run in arm.runs.values()]
    return next((run.steps / run.epochs for run in runs if run.epochs and run.steps), None)
