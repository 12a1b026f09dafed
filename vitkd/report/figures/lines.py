"""Accuracy over alpha and over epochs, and the ratio of the two losses' gradients over alpha."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy import stats

from vitkd.report.arms import ALONE, Arm
from vitkd.report.comparison import Comparison
from vitkd.report.experiments import Experiment
from vitkd.report.figures.plots import DECADES, INK, QUIET, PlotGroup, limits, new_axes, ramp, render, series
from vitkd.report.formatting import shortened
from vitkd.report.parsing import median_ratio
from vitkd.report.settings import CONSTANT, group_by
from vitkd.report.statistics import Band, band

ALPHA_LABEL = "alpha (weight of the class loss)"


def accuracy_over_alpha(comparison: Comparison) -> PlotGroup:
    """One plot a granularity, one line a loss, and the student alone."""
    arms, alone = comparison.experiment.arms, comparison.experiment.baseline
    shown = [*(arm for arm in arms if arm.granularity), *([alone] if alone else [])]
    y_limits = limits([acc for arm in shown for acc in arm.metric("acc_last").values()])
    return PlotGroup(
        "Accuracy over alpha",
        "Test accuracy of the last epoch: lines are means over seeds, bands 95 % intervals of the mean"
        f" (Student's t; may extend beyond the frame), dots single runs; grey is the {ALONE}, which alpha = 1"
        " equals with constant weighting.",
        [
            render(f"test accuracy over alpha, {title}", draw_accuracy, title, lines, alone, y_limits)
            for title, lines in lines_by_title(arms).items()
            # A control at one alpha makes no line; the plot of all gains has it.
            if "," not in title or any(len(line) > 1 for line in lines.values())
        ],
    )


def lines_by_title(arms: Sequence[Arm]) -> dict[str, dict[str, list[Arm]]]:
    """Title of a plot → loss → the arms of a line, which may be none."""
    arms = [arm for arm in arms if arm.granularity]
    losses = sorted({arm.loss for arm in arms})
    titles = group_by(arms, lambda arm: ", ".join(filter(None, (arm.granularity, arm.extra_text))))
    return {
        title: {loss: [arm for arm in members if arm.loss == loss] for loss in losses}
        for title, members in titles.items()
    }


def draw_accuracy(
    figure: Figure, title: str, lines: Mapping[str, list[Arm]], alone: Arm | None, y_limits: tuple
) -> None:
    """One line a loss, which ends in the student alone if that is what alpha = 1 trains."""
    axes = new_axes(figure, ALPHA_LABEL, "test accuracy, %", shortened(title))
    arms = [arm for line in lines.values() for arm in line]
    ends = [alone] if alone and arms[0].weighting == CONSTANT else []
    alpha_axis(axes, [arm.alpha for arm in arms + ends])
    if alone:
        low, mean, high = mean_and_ends(alone)
        axes.axhline(mean, color=QUIET, linestyle="--", linewidth=1.2, label=ALONE)
        axes.axhspan(low, high, color=QUIET, alpha=0.16, linewidth=0)
    for number, (loss, line) in enumerate(lines.items()):
        if line:
            draw_line(axes, [(arm.alpha, *mean_and_ends(arm)) for arm in line + ends], loss, number)
            draw_runs(figure, axes, line, number)
    axes.set_ylim(*y_limits)


def alpha_axis(axes: Axes, alphas: Iterable[float]) -> None:
    """Tick the x axis at `alphas`, on a log scale if they span decades; 0 is one decade below the lowest."""
    known = sorted(set(alphas))
    positive = [alpha for alpha in known if alpha > 0]
    if positive and positive[-1] / positive[0] >= DECADES:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.9)
        axes.set_xlabel(f"{axes.get_xlabel()}, log scale")
        axes.xaxis.set_minor_locator(NullLocator())
    at = axes.xaxis.get_transform().transform(np.array(known))
    kept = spaced(at, 0.06 * (at[-1] - at[0]))
    axes.set_xticks([known[k] for k in kept], [f"{known[k]:g}" for k in kept])


def spaced(at: Sequence[float] | np.ndarray, min_distance: float) -> list[int]:
    """Indices of ascending positions at least `min_distance` apart, chosen from the right."""
    kept: list[int] = []
    for index in reversed(range(len(at))):
        if not kept or at[kept[-1]] - at[index] >= min_distance:
            kept.append(index)
    return kept[::-1]


def mean_and_ends(arm: Arm) -> tuple[float, float, float]:
    """Low end, mean and high end of an arm's accuracy; all equal without an interval."""
    summary = arm.summary("acc_last")
    assert summary.mean is not None
    low, high = summary.interval or (summary.mean, summary.mean)
    return low, summary.mean, high


def draw_line(axes: Axes, points: Sequence[tuple[float, ...]], label: str, number: int) -> None:
    """A line and a band through points (x, low, middle, high)."""
    look = series(number)
    at, low, middle, high = zip(*points, strict=True)
    axes.plot(at, middle, **look, label=label)
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def draw_runs(figure: Figure, axes: Axes, arms: Sequence[Arm], number: int) -> None:
    """A dot for each run, shifted so that lines do not hide each other's dots."""
    points = [(arm.alpha, acc) for arm in arms for acc in arm.metric("acc_last").values()]
    shift = ScaledTranslation(0.04 * (number - 1), 0, figure.dpi_scale_trans)
    look = series(number) | {"marker": ".", "linestyle": "", "markersize": 3, "alpha": 0.6}
    axes.plot(*zip(*points, strict=True), **look, transform=axes.transData + shift)


def gradient_ratios(comparison: Comparison) -> PlotGroup:
    """Gradient norm of the transfer loss over that of the class loss: a plot a granularity, a line a loss."""
    arms = [arm for arm in comparison.experiment.arms if arm.granularity and ratios_of(arm)]
    ratios = [ratio for arm in arms for ratio in ratios_of(arm)]
    y_limits = (min([*ratios, 0.5]) / 2, max([*ratios, 2.0]) * 2)
    return PlotGroup(
        "Gradient norms of the two losses",
        "Gradient norm of the transfer loss over that of the class loss, both weighted:"
        " (1 − alpha)·‖∇L_transfer‖ / (alpha·‖∇L_class‖) for constant weighting, on a log scale. Above 1 the"
        " transfer loss dominates, below 1 the class loss. The value of a run is its median over training;"
        " lines are geometric means over seeds, bands their range.",
        [
            render(f"gradient-norm ratio over alpha, {title}", draw_ratios, title, lines, y_limits)
            for title, lines in lines_by_title(arms).items()
        ],
    )


def ratios_of(arm: Arm) -> list[float]:
    """The median gradient ratio of each run that measured it."""
    return [ratio for run in arm.runs.values() if (ratio := median_ratio(run.curves)) is not None]


def draw_ratios(figure: Figure, title: str, lines: Mapping[str, list[Arm]], y_limits: tuple) -> None:
    """One line and band a loss."""
    axes = new_axes(figure, ALPHA_LABEL, "gradient-norm ratio", shortened(title))
    alpha_axis(axes, [arm.alpha for line in lines.values() for arm in line])
    axes.set_yscale("log")
    axes.axhline(1, color=INK, linewidth=0.8)
    for number, (loss, line) in enumerate(lines.items()):
        ratios = [(arm.alpha, ratios_of(arm)) for arm in line]
        if points := [(alpha, min(rs), float(stats.gmean(rs)), max(rs)) for alpha, rs in ratios]:
            draw_line(axes, points, loss, number)
    axes.set_ylim(*y_limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def learning_curves(comparison: Comparison) -> PlotGroup:
    """One plot for each transfer loss, one line for each alpha, and the student alone."""
    experiment = comparison.experiment
    plots = []
    by_label = group_by(experiment.arms or experiment.rows, lambda arm: arm.label_without_alpha)
    for label, arms in by_label.items():
        bands = [(arm, over_seeds) for arm in arms if (over_seeds := band_of(arm))]
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
    """One line and band an arm, over steps if no run counted those of an epoch."""
    alphas = sorted({arm.alpha for arm in experiment.arms})
    runs = [run for arm in experiment.rows for run in arm.runs.values()]
    epoch = next((run.steps / run.epochs for run in runs if run.epochs and run.steps), None)
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
